// Every op's schema, and the Python module pytbptt._C that holds the facts of this build. What an op means is said in
// pytbptt/ops; the kernels register themselves in cpu/.
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "cuda/lstm_plan.h"

TORCH_LIBRARY(pytbptt, library) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  // log_sum_exp (B, H, T) is in units of log2 and has +inf where a query sees no key.
  library.def(
      "rel_attention(Tensor query, Tensor key, Tensor value, Tensor position, Tensor content_bias, "
      "Tensor position_bias, Tensor? memory_key, Tensor? memory_value, Tensor? first_key, int? window, "
      "float scale, float dropout_p, Tensor? seed) -> (Tensor out, Tensor log_sum_exp)",
      tags);
  // The last two results are empty unless memory_needs_grad.
  library.def(
      "rel_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor position, "
      "Tensor content_bias, Tensor position_bias, Tensor? memory_key, Tensor? memory_value, Tensor? first_key, "
      "int? window, float scale, float dropout_p, Tensor? seed, Tensor out, Tensor log_sum_exp, "
      "bool memory_needs_grad) -> (Tensor query, Tensor key, Tensor value, Tensor position, Tensor content_bias, "
      "Tensor position_bias, Tensor memory_key, Tensor memory_value)",
      tags);
  // activated holds i f g o after their non-linearities, (T, B, 4H), and cells every c, (T, B, H), for the backward;
  // both are empty unless save.
  library.def(
      "lstm(Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0, Tensor? reset, bool save) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor activated, Tensor cells)",
      tags);
  library.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor weight_hh, Tensor h0, "
      "Tensor c0, Tensor? reset, Tensor output, Tensor activated, Tensor cells) "
      "-> (Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0)",
      tags);
}

namespace {

pybind11::dict build_facts() {
  pybind11::list isas;
  for (const char* const* name = pytbptt::cpu::built_isas(); *name != nullptr; ++name) isas.append(*name);
  pybind11::dict facts;
  facts["torch"] = TORCH_VERSION;
  facts["compiler"] = __VERSION__;
  facts["cpu_isas"] = isas;
  facts["cpu_isa_in_use"] = pytbptt::cpu::isa_name(pytbptt::cpu::selected_isa());
#ifdef PYTBPTT_CUDA
  facts["why_no_cuda"] = pybind11::none();
#else
  facts["why_no_cuda"] = PYTBPTT_WHY_NO_CUDA;
#endif
  return facts;
}

pytbptt::cuda::Arithmetic arithmetic_named(const std::string& name) {
  using pytbptt::cuda::Arithmetic;
  if (name == "float16") return Arithmetic::float16;
  if (name == "bfloat16") return Arithmetic::bfloat16;
  if (name == "float32") return Arithmetic::float32;
  if (name == "tf32") return Arithmetic::tf32;
  throw pybind11::value_error("lstm_plan: dtype: found " + name + ", expected float16, bfloat16, float32 or tf32");
}

pybind11::dict lstm_plan(std::int64_t hidden, std::int64_t batch, const std::string& dtype,
                         const std::map<std::string, std::int64_t>& limits) {
  if (hidden < 1 || batch < 1) {
    throw pybind11::value_error("lstm_plan: hidden and batch: found " + std::to_string(hidden) + " and " +
                                std::to_string(batch) + ", expected at least 1");
  }
  const auto limit = [&](const char* name) {
    const auto found = limits.find(name);
    if (found == limits.end() || found->second < 1) {
      throw pybind11::value_error(std::string("lstm_plan: limits: expected ") + name + " of at least 1");
    }
    return found->second;
  };
  const pytbptt::cuda::GpuLimits gpu{limit("multiprocessors"), limit("shared_bytes"), limit("registers")};
  pybind11::dict both;
  for (const bool backward : {false, true}) {
    const auto plan = pytbptt::cuda::plan_lstm(backward, hidden, batch, arithmetic_named(dtype), gpu);
    pybind11::dict facts;
    facts["variant"] = plan.persistent ? "persistent" : "by step";
    facts["cells"] = plan.cells_in_registers ? "registers" : "memory";
    facts["blocks"] = plan.blocks();
    facts["groups"] = plan.groups;
    facts["units"] = plan.units;
    facts["streams"] = plan.stream_tiles * pytbptt::cuda::lstm_tile_streams;
    facts["shared_bytes"] = plan.shared_bytes;
    facts["weights_in_registers"] = plan.held_bytes;
    facts["weights_in_shared"] = plan.resident_bytes;
    facts["weights_from_l2"] = plan.streamed_bytes;
    facts["exchange_bytes"] = plan.exchange_bytes;
    facts["workspace_bytes"] = plan.workspace_bytes;
    both[backward ? "backward" : "forward"] = facts;
  }
  return both;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_facts", &build_facts, "What this extension was built with, and what it runs here.");
  module.def(
      "lstm_plan", &lstm_plan,
      "How the LSTM's forward and backward would run on a GPU with `limits`: its multiprocessors, the shared_bytes "
      "that a block may have, and the registers of a multiprocessor. Units and streams are a block's, as are the "
      "bytes, but for those of the exchange and of the workspace; cells, c and its gradient, lie in registers or in "
      "memory between steps.",
      pybind11::arg("hidden"), pybind11::arg("batch"), pybind11::arg("dtype"), pybind11::arg("limits"));
}

// Python module pytbptt._C: build configuration and the LSTM's CUDA launch plan. Importing it registers the ops and
// their CPU kernels.
#include <torch/headeronly/version.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/cpu/isa.h"
#include "common/cpu/parallel.h"
#include "lstm/cuda/plan.h"

namespace {

pybind11::dict build_facts() {
  pybind11::list isas;
  for (const char* const* name = pytbptt::cpu::built_isas(); *name != nullptr; ++name) isas.append(*name);
  pybind11::dict facts;
  facts["torch"] = TORCH_VERSION;
  facts["compiler"] = __VERSION__;
  facts["cpu_isas"] = isas;
  facts["cpu_isa_in_use"] = pytbptt::cpu::isa_name(pytbptt::cpu::selected_isa());
  return facts;
}

pytbptt::cuda::ComputeType parse_compute_type(const std::string& name) {
  using pytbptt::cuda::ComputeType;
  if (name == "float16") return ComputeType::float16;
  if (name == "bfloat16") return ComputeType::bfloat16;
  if (name == "float32") return ComputeType::float32;
  if (name == "tf32") return ComputeType::tf32;
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
    const auto plan = pytbptt::cuda::plan_lstm(backward, hidden, batch, parse_compute_type(dtype), gpu);
    pybind11::dict facts;
    facts["variant"] = plan.persistent ? "persistent" : "per step";
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
  module.def("set_threads_run_concurrently", &pytbptt::cpu::set_threads_run_concurrently,
             "Whether the workers of torch's parallel_for all run at once, as OpenMP's do. If not, lstm uses one "
             "thread, because its threads wait for one another.");
  module.def(
      "lstm_plan", &lstm_plan,
      "How the LSTM's forward and backward would run on a GPU with `limits`: its multiprocessors, the shared_bytes "
      "that a block may have, and the registers of a multiprocessor. Units, streams and bytes are per block, except "
      "exchange_bytes and workspace_bytes, which are for the whole grid. `cells` says where c (or its gradient) is "
      "kept between steps.",
      pybind11::arg("hidden"), pybind11::arg("batch"), pybind11::arg("dtype"), pybind11::arg("limits"));
}

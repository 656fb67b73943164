// Every op's schema, and the Python module pytbptt._C that holds the facts of this build. What an op means is said in
// pytbptt/ops; the kernels register themselves in cpu/.
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include <pybind11/pybind11.h>

#include "cpu/isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_facts", &build_facts, "What this extension was built with, and what it runs here.");
}

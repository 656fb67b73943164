// Every op's schema. What an op means is said in pytbptt/ops; the kernels register themselves in cpu/ and cuda/.
#include "common/tensors.h"

// tf32: whether float32 products on CUDA may round their operands to TF32.
STABLE_TORCH_LIBRARY(pytbptt, library) {
  // log_sum_exp (B, H, T) is in units of log2 and has +inf where a query sees no key. rounding is what was rounded off
  // out, for the backward: empty unless save, and where out is not of 16 bits.
  library.def(
      "rel_attention(Tensor query, Tensor key, Tensor value, Tensor position, Tensor content_bias, "
      "Tensor position_bias, Tensor? memory_key, Tensor? memory_value, Tensor? first_key, int? window, "
      "float scale, float dropout_p, Tensor? seed, bool save, bool tf32) "
      "-> (Tensor out, Tensor rounding, Tensor log_sum_exp)");
  // The last two results are empty unless memory_needs_grad.
  library.def(
      "rel_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor position, "
      "Tensor content_bias, Tensor position_bias, Tensor? memory_key, Tensor? memory_value, Tensor? first_key, "
      "int? window, float scale, float dropout_p, Tensor? seed, Tensor out, Tensor rounding, "
      "Tensor log_sum_exp, bool memory_needs_grad, bool tf32) -> (Tensor query, Tensor key, Tensor value, Tensor "
      "position, "
      "Tensor content_bias, Tensor position_bias, Tensor memory_key, Tensor memory_value)");
  // activated holds i f g o after their non-linearities, (T, B, 4H), and cells every c, (T, B, H), for the backward;
  // both are empty unless save.
  library.def(
      "lstm(Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0, Tensor? reset, bool save, bool tf32) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor activated, Tensor cells)");
  library.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor weight_hh, Tensor h0, "
      "Tensor c0, Tensor? reset, Tensor output, Tensor activated, Tensor cells, bool tf32) "
      "-> (Tensor gates, Tensor weight_hh, Tensor h0, Tensor c0)");
}

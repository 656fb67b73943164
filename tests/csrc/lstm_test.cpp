// Compares the CPU kernels of lstm with a reference in double, for every instruction set of this machine and several
// thread grids. It needs neither torch nor Python, so that it can run under sanitizers.
#include <cstring>
#include <random>
#include <thread>

#include "comparison.h"
#include "lstm/cpu/team.h"

namespace {

using namespace pytbptt;
using namespace pytbptt::cpu;
using std::int64_t;

struct Case {
  int64_t T, B, H;
  bool resets;
  bool state_gradients;  // whether h_n and c_n have gradients, as output always has
};

struct ThreadGrid {
  int stream_groups, unit_groups;
};

template <typename T>
std::vector<T> random_vector(int64_t count, std::mt19937& random, double scale = 1) {
  std::normal_distribution<double> normal;
  std::vector<T> elements(count);
  for (T& element : elements) element = static_cast<T>(scale * normal(random));
  return elements;
}

// Elements between the rows of the inputs, so that reading past the end of a row gives wrong results.
constexpr int64_t row_padding = 3;

template <typename T>
struct Problem {
  Case size;
  int64_t gates_stride, state_stride;  // elements from one row to the next
  std::mt19937 random{7};
  std::vector<T> gates, weight, h0, c0, grad_output, grad_h_n, grad_c_n;
  std::unique_ptr<bool[]> reset;

  explicit Problem(const Case& c)
      : size(c),
        gates_stride(4 * c.H + row_padding),
        state_stride(c.H + row_padding),
        gates(random_vector<T>(c.T * c.B * gates_stride, random)),
        weight(random_vector<T>(4 * c.H * state_stride, random, 1 / std::sqrt(static_cast<double>(c.H)))),
        h0(random_vector<T>(c.B * state_stride, random)),
        c0(random_vector<T>(c.B * state_stride, random)),
        grad_output(random_vector<T>(c.T * c.B * state_stride, random)),
        grad_h_n(random_vector<T>(c.B * state_stride, random)),
        grad_c_n(random_vector<T>(c.B * state_stride, random)),
        reset(new bool[c.T * c.B]) {
    for (int64_t row = 0; row < c.T * c.B; ++row) reset[row] = c.resets && random() % 3 == 0;
  }
};

template <typename T>
struct Results {
  std::vector<T> output, h_n, c_n, activated, cells, grad_gates, grad_weight, grad_h0, grad_c0;

  explicit Results(const Case& c, T value)
      : output(c.T * c.B * c.H, value),
        h_n(c.B * c.H, value),
        c_n(h_n),
        activated(4 * output.size(), value),
        cells(output),
        grad_gates(activated),
        grad_weight(4 * c.H * c.H, value),
        grad_h0(h_n),
        grad_c0(h_n) {}

  // Calls visit(name, vector) for every result.
  template <typename Visitor>
  void for_each(const Visitor& visit) const {
    visit("output", output), visit("h_n", h_n), visit("c_n", c_n), visit("activated", activated), visit("cells", cells);
    visit("grad_gates", grad_gates), visit("grad_weight", grad_weight), visit("grad_h0", grad_h0),
        visit("grad_c0", grad_c0);
  }
};

template <typename Kernel, typename Parameters>
void run(const Kernel& kernel, const Parameters& parameters, ThreadGrid grid) {
  const int threads = grid.stream_groups * grid.unit_groups;
  const auto workspace = allocate_workspace(kernel.workspace(parameters, threads));
  std::vector<Barrier> barriers(static_cast<std::size_t>(grid.stream_groups) + 1, Barrier{0});
  std::vector<std::thread> workers;
  for (int rank = 0; rank < threads; ++rank) {
    workers.emplace_back([&, rank] {
      kernel.run(parameters, {rank, grid.stream_groups, grid.unit_groups, barriers.data(), barriers.data() + 1},
                 workspace.get());
    });
  }
  for (std::thread& worker : workers) worker.join();
}

template <typename T>
Results<T> run_kernels(Isa isa, const Problem<T>& p, ThreadGrid grid) {
  const auto [T_, B, H, resets, state_gradients] = p.size;
  Results<T> r(p.size, nan_fill<T>);
  Lstm inputs{};
  inputs.T = T_, inputs.B = B, inputs.H = H;
  inputs.dtype = sizeof(T) == 8 ? Scalar::float64 : Scalar::float32;
  inputs.weight_hh = p.weight.data(), inputs.weight_stride = p.state_stride;
  inputs.h0 = {p.h0.data(), p.state_stride}, inputs.c0 = {p.c0.data(), p.state_stride};
  inputs.reset = resets ? p.reset.get() : nullptr;
  const LstmForward forward{inputs,          {p.gates.data(), B * p.gates_stride, p.gates_stride},
                            r.output.data(), r.h_n.data(),
                            r.c_n.data(),    r.activated.data(),
                            r.cells.data()};
  run(lstm_forward_kernel(isa), forward, grid);
  const auto state = [&](const std::vector<T>& grad) { return StateRows{grad.data(), p.state_stride}; };
  const LstmBackward backward{inputs,
                              {p.grad_output.data(), B * p.state_stride, p.state_stride},
                              state_gradients ? state(p.grad_h_n) : StateRows{},
                              state_gradients ? state(p.grad_c_n) : StateRows{},
                              r.output.data(),
                              r.activated.data(),
                              r.cells.data(),
                              r.grad_gates.data(),
                              r.grad_weight.data(),
                              r.grad_h0.data(),
                              r.grad_c0.data()};
  run(lstm_backward_kernel(isa), backward, grid);

  // Without tensors saved for the backward pass, the forward pass gives the same results.
  Results<T> inference(p.size, nan_fill<T>);
  const LstmForward inference_forward{
      inputs, forward.gates, inference.output.data(), inference.h_n.data(), inference.c_n.data(), nullptr, nullptr};
  run(lstm_forward_kernel(isa), inference_forward, grid);
  if (inference.output != r.output || inference.h_n != r.h_n || inference.c_n != r.c_n) {
    ++failures;
    std::printf("FAILED %s: results differ if nothing is saved for the backward pass\n", isa_name(isa));
  }
  return r;
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

template <typename T>
Results<double> reference(const Problem<T>& p) {
  const auto [T_, B, H, resets, state_gradients] = p.size;
  Results<double> e(p.size, 0.0);
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> h(p.h0.begin() + b * p.state_stride, p.h0.begin() + b * p.state_stride + H);
    std::vector<double> c(p.c0.begin() + b * p.state_stride, p.c0.begin() + b * p.state_stride + H);
    std::vector<std::vector<double>> h_before(T_), c_before(T_);
    for (int64_t t = 0; t < T_; ++t) {
      const int64_t row = t * B + b;
      if (p.reset[row]) h.assign(H, 0), c.assign(H, 0);
      h_before[t] = h, c_before[t] = c;
      double* activated = e.activated.data() + row * 4 * H;
      for (int64_t gate = 0; gate < 4 * H; ++gate) {
        double sum = p.gates[row * p.gates_stride + gate];
        for (int64_t k = 0; k < H; ++k) sum += p.weight[gate * p.state_stride + k] * h_before[t][k];
        activated[gate] = gate / H == 2 ? std::tanh(sum) : sigmoid(sum);
      }
      for (int64_t n = 0; n < H; ++n) {
        const double i = activated[n], f = activated[H + n], g = activated[2 * H + n], o = activated[3 * H + n];
        c[n] = f * c[n] + i * g;
        h[n] = o * std::tanh(c[n]);
        e.cells[row * H + n] = c[n];
        e.output[row * H + n] = h[n];
      }
    }
    std::copy(h.begin(), h.end(), e.h_n.begin() + b * H);
    std::copy(c.begin(), c.end(), e.c_n.begin() + b * H);

    std::vector<double> dh(H, 0), dc(H, 0);
    for (int64_t n = 0; n < H && state_gradients; ++n) {
      dh[n] = p.grad_h_n[b * p.state_stride + n];
      dc[n] = p.grad_c_n[b * p.state_stride + n];
    }
    for (int64_t t = T_ - 1; t >= 0; --t) {
      const int64_t row = t * B + b;
      const double* activated = e.activated.data() + row * 4 * H;
      double* d_gates = e.grad_gates.data() + row * 4 * H;
      for (int64_t n = 0; n < H; ++n) {
        const double i = activated[n], f = activated[H + n], g = activated[2 * H + n], o = activated[3 * H + n];
        const double tanh_c = std::tanh(e.cells[row * H + n]);
        dh[n] += p.grad_output[row * p.state_stride + n];
        dc[n] += dh[n] * o * (1 - tanh_c * tanh_c);
        d_gates[n] = dc[n] * g * i * (1 - i);
        d_gates[H + n] = dc[n] * c_before[t][n] * f * (1 - f);
        d_gates[2 * H + n] = dc[n] * i * (1 - g * g);
        d_gates[3 * H + n] = dh[n] * tanh_c * o * (1 - o);
        dc[n] = p.reset[row] ? 0 : dc[n] * f;
      }
      dh.assign(H, 0);
      for (int64_t gate = 0; gate < 4 * H; ++gate) {
        for (int64_t k = 0; k < H; ++k) {
          e.grad_weight[gate * H + k] += d_gates[gate] * h_before[t][k];
          if (!p.reset[row]) dh[k] += d_gates[gate] * p.weight[gate * p.state_stride + k];
        }
      }
    }
    std::copy(dh.begin(), dh.end(), e.grad_h0.begin() + b * H);
    std::copy(dc.begin(), dc.end(), e.grad_c0.begin() + b * H);
  }
  return e;
}

template <typename T>
void check(Isa isa, const Case& c) {
  const std::string name = std::string(isa_name(isa)) + (sizeof(T) == 8 ? " double" : " float") + " T" +
                           std::to_string(c.T) + " B" + std::to_string(c.B) + " H" + std::to_string(c.H) + " ";
  const Problem<T> problem(c);
  const Results<T> single_thread = run_kernels(isa, problem, {1, 1});
  const Results<double> expected = reference(problem);
  std::vector<std::vector<double>> expected_results;
  expected.for_each([&](const char*, const std::vector<double>& result) { expected_results.push_back(result); });
  std::size_t n = 0;
  single_thread.for_each([&](const char* result_name, const std::vector<T>& result) {
    compare(name + result_name, result, expected_results[n++]);
  });

  // Every thread grid gives bit-identical results, also if some threads have no units.
  for (const ThreadGrid grid : {ThreadGrid{1, 2}, ThreadGrid{1, 3}, ThreadGrid{2, 1}, ThreadGrid{2, 2}}) {
    if (grid.stream_groups > c.B) continue;
    const Results<T> multi_thread = run_kernels(isa, problem, grid);
    std::vector<std::vector<T>> results;
    multi_thread.for_each([&](const char*, const std::vector<T>& result) { results.push_back(result); });
    n = 0;
    single_thread.for_each([&](const char* result_name, const std::vector<T>& result) {
      if (std::memcmp(result.data(), results[n++].data(), result.size() * sizeof(T)) == 0) return;
      ++failures;
      std::printf("FAILED %s%s: not bit-identical with %d x %d threads\n", name.c_str(), result_name,
                  grid.stream_groups, grid.unit_groups);
    });
  }
}

}  // namespace

int main() {
  // Partial vectors, several blocks of k, batches larger than a tile, several blocks of the weight gradient.
  const Case cases[] = {{1, 1, 1, false, true},  {1, 3, 130, true, true},  {5, 1, 41, false, true},
                        {4, 7, 17, true, false}, {3, 33, 33, true, true},  {2, 2, 230, false, false},
                        {9, 13, 64, true, true}, {1, 20, 111, false, true}};
  for (const Case& c : cases) {
    for_isas_and_precisions([&](Isa isa, auto element) { check<decltype(element)>(isa, c); });
  }
  return report();
}

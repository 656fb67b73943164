// Compares the CPU kernels of rel_attention with a reference in double, for every instruction set of this machine.
// It needs neither torch nor Python, so that it can run under sanitizers.
#include <random>
#include <thread>

#include "comparison.h"
#include "rel_attention/cpu/tasks.h"

namespace {

using namespace pytbptt;
using namespace pytbptt::cpu;
using std::int64_t;

struct Case {
  int64_t B, T, M, H, D, R, window;
  bool first_key, memory_needs_grad;
};

// A tensor with `row_padding` elements after each row, so that reading past the end of a row gives wrong results.
template <typename T>
struct Buffer {
  std::vector<T> data;
  int64_t rows, heads, depth, row_padding;

  Buffer(int64_t batch, int64_t rows_, int64_t heads_, int64_t depth_, int64_t row_padding_, std::mt19937& random)
      : data(batch * rows_ * (heads_ * depth_ + row_padding_)),
        rows(rows_),
        heads(heads_),
        depth(depth_),
        row_padding(row_padding_) {
    std::normal_distribution<double> normal;
    for (T& element : data) element = static_cast<T>(normal(random));
  }
  int64_t offset(int64_t b, int64_t r, int64_t h) const {
    return (b * rows + r) * (heads * depth + row_padding) + h * depth;
  }
  Operand operand() const {
    return {data.data(), rows * (heads * depth + row_padding), heads * depth + row_padding, depth};
  }
};

template <typename T>
struct Problem {
  Case size;
  std::mt19937 random{7};
  Buffer<T> query, key, value, memory_key, memory_value, position, biases, grad_out;
  std::vector<std::int32_t> first_key;
  std::vector<T> out, log_sum_exp, d_query, d_key, d_value, d_position, d_biases, d_memory_key, d_memory_value;

  explicit Problem(const Case& c)
      : size(c),
        query(c.B, c.T, c.H, c.D, 3, random),
        key(c.B, c.T, c.H, c.D, 0, random),
        value(c.B, c.T, c.H, c.D, 1, random),
        memory_key(c.B, c.M, c.H, c.D, 2, random),
        memory_value(c.B, c.M, c.H, c.D, 0, random),
        position(1, c.R, c.H, c.D, 0, random),
        biases(1, 2, c.H, c.D, 0, random),
        grad_out(c.B, c.T, c.H, c.D, 0, random),
        first_key(c.B * c.T, 0),
        out(c.B * c.T * c.H * c.D, nan_fill<T>),
        log_sum_exp(c.B * c.H * c.T, nan_fill<T>),
        d_query(out),
        d_key(out),
        d_value(out),
        d_position(c.R * c.H * c.D, nan_fill<T>),
        d_biases(2 * c.H * c.D, nan_fill<T>),
        d_memory_key(c.B * c.M * c.H * c.D, nan_fill<T>),
        d_memory_value(d_memory_key) {
    for (std::int32_t& first : first_key) {
      first = c.first_key ? static_cast<std::int32_t>(random() % (c.M + c.T + 3)) - 1 : 0;
    }
  }

  RelAttention inputs() const {
    RelAttention in{};
    in.B = size.B, in.T = size.T, in.M = size.M, in.H = size.H, in.D = size.D, in.R = size.R;
    in.dtype = sizeof(T) == 8 ? Scalar::float64 : Scalar::float32;
    in.query = query.operand(), in.key = key.operand(), in.value = value.operand();
    in.memory_key = memory_key.operand(), in.memory_value = memory_value.operand();
    in.position = {position.data.data(), 0, size.H * size.D, size.D};
    in.content_bias = {biases.data.data(), 0, 0, size.D};
    in.position_bias = {biases.data.data() + size.H * size.D, 0, 0, size.D};
    in.first_key = first_key.data();
    in.window = std::min(size.window, size.M + size.T);
    in.scale = 1 / std::sqrt(static_cast<double>(size.D));
    in.keep_scale = 1;
    return in;
  }

  void run(Isa isa) {
    const RelAttentionForwardKernel& forward_kernel = rel_attention_forward_kernel(isa);
    const RelAttentionBackwardKernel& backward_kernel = rel_attention_backward_kernel(isa);
    const RelAttention in = inputs();
    const RelAttentionForward forward{in, out.data(), log_sum_exp.data(), nullptr};
    const auto run_heads_on_two_threads = [&](const auto& run_head) {
      std::thread odd([&] {
        for (int64_t h = 1; h < size.H; h += 2) run_head(h);
      });
      for (int64_t h = 0; h < size.H; h += 2) run_head(h);
      odd.join();
    };
    run_heads_on_two_threads([&](int64_t head) {
      // Split as for more threads: the last stream is a task of its own, with its queries split in two.
      const int64_t cut = std::min(queries_per_tile(in.T), in.T);
      const ForwardTask tasks[] = {
          {head, 0, in.B - 1, 0, in.T}, {head, in.B - 1, in.B, 0, cut}, {head, in.B - 1, in.B, cut, in.T}};
      for (const ForwardTask& task : tasks) {
        if (task.first_stream == task.end_stream || task.first_query == task.end_query) continue;
        forward_kernel.run(forward, task, allocate_workspace(forward_kernel.workspace(in, task)).get());
      }
    });
    const RelAttentionBackward backward{in,
                                        grad_out.operand(),
                                        {out.data(), in.T * in.H * in.D, in.H * in.D, in.D},
                                        {},
                                        log_sum_exp.data(),
                                        size.memory_needs_grad,
                                        d_query.data(),
                                        d_key.data(),
                                        d_value.data(),
                                        d_position.data(),
                                        d_biases.data(),
                                        d_biases.data() + in.H * in.D,
                                        d_memory_key.data(),
                                        d_memory_value.data()};
    run_heads_on_two_threads([&](int64_t head) {
      const auto workspace = allocate_workspace(backward_kernel.workspace(in));
      if (head % 2 == 0 || in.B == 1) {
        backward_kernel.run(backward, {head, 0, in.B, nullptr}, workspace.get());
      } else {
        const auto partial_sums = allocate_workspace(2 * backward_kernel.partial_sums_size(in));
        char* sums = static_cast<char*>(partial_sums.get());
        backward_kernel.run(backward, {head, 0, 1, sums}, workspace.get());
        backward_kernel.run(backward, {head, 1, in.B, sums + backward_kernel.partial_sums_size(in)}, workspace.get());
        backward_kernel.reduce(backward, head, sums, 2);
      }
    });
  }
};

struct Reference {
  std::vector<double> out, query, key, value, position, biases;  // key and value: memory and chunk, (B, M + T, H, D)
};

template <typename T>
Reference reference(const Problem<T>& p) {
  // Not a structured binding, which a lambda cannot capture in C++17.
  const int64_t B = p.size.B, T_ = p.size.T, M = p.size.M, H = p.size.H, D = p.size.D, R = p.size.R;
  const int64_t window = p.size.window, keys = M + T_;
  Reference e;
  e.out.assign(B * T_ * H * D, 0), e.query = e.out, e.position.assign(R * H * D, 0), e.biases.assign(2 * H * D, 0);
  e.key.assign(B * keys * H * D, 0), e.value = e.key;
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t i = 0; i < T_; ++i) {
        const int64_t first = std::max({int64_t{p.first_key[b * T_ + i]}, M + i - window + 1, int64_t{0}});
        const T* q = p.query.data.data() + p.query.offset(b, i, h);
        const T* u = p.biases.data.data() + h * D;
        const T* v = p.biases.data.data() + (H + h) * D;
        const T* grad = p.grad_out.data.data() + p.grad_out.offset(b, i, h);
        const auto row_of = [&](const Buffer<T>& memory, const Buffer<T>& chunk, int64_t j) {
          return j < M ? memory.data.data() + memory.offset(b, j, h) : chunk.data.data() + chunk.offset(b, j - M, h);
        };
        const auto position_of = [&](int64_t j) {
          return p.position.data.data() + p.position.offset(0, std::min(M + i - j, R - 1), h);
        };
        std::vector<double> weights;
        double total = 0, largest = -INFINITY;
        for (int64_t j = first; j <= M + i; ++j) {
          double score = 0;
          for (int64_t d = 0; d < D; ++d) {
            score +=
                (double{q[d]} + u[d]) * row_of(p.memory_key, p.key, j)[d] + (double{q[d]} + v[d]) * position_of(j)[d];
          }
          weights.push_back(score * scale);
          largest = std::max(largest, weights.back());
        }
        for (double& weight : weights) total += weight = std::exp(weight - largest);
        double* out = e.out.data() + ((b * T_ + i) * H + h) * D;
        double delta = 0;
        for (int64_t j = first; j <= M + i; ++j) {
          for (int64_t d = 0; d < D; ++d) out[d] += weights[j - first] / total * row_of(p.memory_value, p.value, j)[d];
        }
        for (int64_t d = 0; d < D; ++d) delta += out[d] * grad[d];
        for (int64_t j = first; j <= M + i; ++j) {
          const double weight = weights[j - first] / total;
          const int64_t key_offset = ((b * keys + j) * H + h) * D,
                        position_offset = (std::min(M + i - j, R - 1) * H + h) * D;
          double d_weight = 0;
          for (int64_t d = 0; d < D; ++d) d_weight += double{grad[d]} * row_of(p.memory_value, p.value, j)[d];
          const double d_score = scale * weight * (d_weight - delta);
          for (int64_t d = 0; d < D; ++d) {
            const double key = row_of(p.memory_key, p.key, j)[d], position = position_of(j)[d];
            e.value[key_offset + d] += weight * grad[d];
            e.key[key_offset + d] += d_score * (double{q[d]} + u[d]);
            e.position[position_offset + d] += d_score * (double{q[d]} + v[d]);
            e.query[((b * T_ + i) * H + h) * D + d] += d_score * (key + position);
            e.biases[h * D + d] += d_score * key;
            e.biases[(H + h) * D + d] += d_score * position;
          }
        }
      }
    }
  }
  return e;
}

template <typename T>
void check(Isa isa, const Case& c) {
  Problem<T> problem(c);
  problem.run(isa);
  const Reference e = reference(problem);
  const std::string name = std::string(isa_name(isa)) + (sizeof(T) == 8 ? " double" : " float") + " B" +
                           std::to_string(c.B) + " T" + std::to_string(c.T) + " M" + std::to_string(c.M) + " D" +
                           std::to_string(c.D) + " R" + std::to_string(c.R) + " ";
  compare(name + "out", problem.out, e.out);
  compare(name + "query", problem.d_query, e.query);
  compare(name + "position", problem.d_position, e.position);
  compare(name + "biases", problem.d_biases, e.biases);
  std::vector<double> key[2], value[2];  // memory, chunk
  const int64_t row = c.H * c.D;
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t j = 0; j < c.M + c.T; ++j) {
      const int64_t offset = (b * (c.M + c.T) + j) * row;
      key[j >= c.M].insert(key[j >= c.M].end(), e.key.begin() + offset, e.key.begin() + offset + row);
      value[j >= c.M].insert(value[j >= c.M].end(), e.value.begin() + offset, e.value.begin() + offset + row);
    }
  }
  compare(name + "key", problem.d_key, key[1]);
  compare(name + "value", problem.d_value, value[1]);
  if (c.memory_needs_grad) {
    compare(name + "memory_key", problem.d_memory_key, key[0]);
    compare(name + "memory_value", problem.d_memory_value, value[0]);
  }
}

}  // namespace

int main() {
  constexpr int64_t none = 1 << 30;
  const Case cases[] = {
      {2, 5, 7, 2, 8, 12, none, false, true},     {1, 1, 0, 1, 41, 1, none, false, false},
      {3, 1, 40, 2, 41, 41, none, true, false},   {2, 3, 9, 1, 5, 4, 3, false, true},
      {2, 100, 61, 3, 41, 161, none, true, true}, {1, 49, 300, 2, 64, 20, 37, false, false},
      {1, 70, 530, 1, 24, 700, none, true, true}, {2, 64, 0, 2, 130, 64, none, false, false},
  };
  for (const Case& c : cases) {
    for_isas_and_precisions([&](Isa isa, auto element) { check<decltype(element)>(isa, c); });
  }
  return report();
}

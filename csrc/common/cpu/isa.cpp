#include "common/cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pytbptt::cpu {
namespace {

Isa best_supported() {
#if defined(__x86_64__)
  // Compiler builtin, as standard C++ cannot query CPU features. clang-cl needs clang_rt.builtins at link time.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = best_supported();
  const char* wanted = std::getenv("PYTBPTT_CPU_ISA");
  if (wanted == nullptr) return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2}) {
    if (isa < best && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return best;
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

const char* const* built_isas() {
#if defined(__x86_64__)
  static const char* const names[] = {"baseline", "avx2", "avx512", nullptr};
#else
  static const char* const names[] = {"baseline", nullptr};
#endif
  return names;
}

}  // namespace pytbptt::cpu

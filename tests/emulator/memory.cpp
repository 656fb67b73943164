// Global and shared memory: bounds, alignment and write access.
#include "emulator_state.h"

#include <cstring>

namespace pytbptt::emulator {

void add_buffer(const void* data, std::size_t bytes, bool writable) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  gpu.buffers.push_back({begin, begin + bytes, writable, {}});
}

void clear_buffers() {
  gpu.buffers.clear();
}

Buffer* find_buffer(const void* data, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  for (Buffer& buffer : gpu.buffers) {
    if (begin >= buffer.begin && begin + bytes <= buffer.end) return &buffer;
  }
  return nullptr;
}

void check_global(const void* data, std::size_t bytes, bool write, const SourceLocation& location) {
  Buffer* const buffer = find_buffer(data, bytes);
  if (buffer == nullptr) fail(write ? "writes outside every buffer" : "reads outside every buffer", location);
  if (reinterpret_cast<std::uintptr_t>(data) % bytes != 0) fail("misaligned in global memory", location);
  if (buffer->writable) return check_global_race(*buffer, data, bytes, write, location);
  if (write) fail("writes to an input", location);
}

void zero_memory(void* data, std::size_t bytes) {
  if (!gpu.error.empty()) return;
  const Buffer* const buffer = find_buffer(data, bytes);
  if (buffer == nullptr || !buffer->writable) {
    gpu.error = "clears memory outside every buffer";
    return;
  }
  std::memset(data, 0, bytes);
}

char* shared_memory(int first_byte, std::size_t bytes) {
  if (first_byte % 16 != 0 || first_byte + bytes > gpu.shared_bytes) {
    fail("shared memory up to byte " + std::to_string(first_byte + bytes) + " of " + std::to_string(gpu.shared_bytes),
         SourceLocation::current());
  }
  return current_block().shared + first_byte;
}

std::size_t shared_offset(const void* data) {
  return static_cast<std::size_t>(static_cast<const char*>(data) - current_block().shared);
}

}  // namespace pytbptt::emulator

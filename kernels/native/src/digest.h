// What memory holds, as one number.
#pragma once

#include <cstring>

#include "abi.h"

namespace RF_VARIANT {

// Each step is one-to-one, in the state for a given line and in the line for a given state: a single line that changed
// always shows, and so do two that changed places.
class Digest {
 public:
  void add(const char* data, int bytes) {
    for (; bytes >= LINE; bytes -= LINE, data += LINE) add_line(data);
    if (!bytes) return;
    char line[LINE] = {};
    memcpy(line, data, bytes);
    add_line(line);
  }

  uint64_t value() const {
    uint64_t value = 0;
    for (int i = 0; i < WORDS; i++) {
      value = (value ^ (uint64_t(halves[0][i]) << 32 | halves[1][i])) * 0x9E3779B97F4A7C15;
      value ^= value >> 29;
    }
    return value;
  }

 private:
  static constexpr int LINE = 64, WORDS = 8;
  typedef uint32_t Words __attribute__((vector_size(WORDS * sizeof(uint32_t))));

  void add_line(const char* line) {
    for (int i = 0; i < 2; i++) {
      Words words;
      memcpy(&words, line + i * sizeof(words), sizeof(words));
      halves[i] = (halves[i] ^ words) * 0x9E3779B1u;
      halves[i] ^= halves[i] >> 15;
    }
  }

  Words halves[2] = {{1, 2, 3, 4, 5, 6, 7, 8}, {9, 10, 11, 12, 13, 14, 15, 16}};
};

static uint64_t digest(const rf_pieces* pieces) {
  constexpr int AHEAD = 16;  // pieces: each is on a page of its own, and not in a cache
  Digest digest;
  const char* data = (const char*)pieces->data;
  for (int i = 0; i < pieces->count; i++, data += pieces->stride) {
    __builtin_prefetch(data + AHEAD * pieces->stride);
    digest.add(data, pieces->bytes);
  }
  return digest.value();
}

}  // namespace RF_VARIANT

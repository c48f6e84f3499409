// Outputs of the strided convolution over packed segments, and tiles of them: a segment of n frames has (n + 1) / 2 outputs.
#pragma once

#include "conv_source.h"
#include "isa.h"

namespace step {
namespace STEP_ISA {

static inline int64_t outputs_of(const int32_t* cu_seqlens, int64_t segment) {
  return (cu_seqlens[segment + 1] - cu_seqlens[segment] + 1) / 2;
}

// Where an output or a tile stands: its segment, and what comes before that segment.
struct Place {
  int64_t segment = 0, first_output = 0, first_tile = 0;

  void move_to_output(int64_t output, const int32_t* cu_seqlens) {
    while (output >= first_output + outputs_of(cu_seqlens, segment)) next(cu_seqlens);
  }
  void move_to_tile(int64_t tile, const int32_t* cu_seqlens) {
    while (tile >= first_tile + tiles(cu_seqlens)) next(cu_seqlens);
  }
  int64_t tiles(const int32_t* cu_seqlens) const { return (outputs_of(cu_seqlens, segment) + kTile - 1) / kTile; }

  void next(const int32_t* cu_seqlens) {
    first_tile += tiles(cu_seqlens);
    first_output += outputs_of(cu_seqlens, segment);
    segment++;
  }
};

// Calls `body(output, count, tile)` for tiles [begin, end): the tile's first output, and how many it has.
template <class Body>
static inline void for_tiles(const int32_t* cu_seqlens, int64_t begin, int64_t end, Body&& body) {
  Place place;
  for (int64_t tile = begin; tile < end; tile++) {
    place.move_to_tile(tile, cu_seqlens);
    const int64_t inside = kTile * (tile - place.first_tile), rest = outputs_of(cu_seqlens, place.segment) - inside;
    body(place.first_output + inside, rest < kTile ? rest : kTile, tile);
  }
}

}  // namespace STEP_ISA
}  // namespace step

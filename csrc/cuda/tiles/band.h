// These are the tiles under a band: dense, causal and window masks, which differ in two numbers only.
#pragma once

#include "cuda/common/band.h"

namespace attnx {
struct ForwardParams;
struct BackwardParams;
}  // namespace attnx

namespace attnx::cuda {

// This is a range of tiles of kSize keys, or of rows, numbered [begin, end).
template <int kSize>
class BandTiles {
  int begin_, end_;

 public:
  __device__ __forceinline__ BandTiles(int begin, int end) : begin_(begin), end_(end) {}

  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int end() const { return end_; }
  // This returns the first key, or row, of a tile.
  __device__ __forceinline__ int first(int tile) const { return tile * kSize; }
  __device__ __forceinline__ float bias(int) const { return 0; }
  __device__ __forceinline__ float divisor(int) const { return 1; }
};

// This is the tiles policy.
struct Banded {
  // Query heads that share a key head share tiles of rows.
  static constexpr bool kPerHead = false;
  // A tile's number says where it lies, so that nothing need be read from memory ahead of its use.
  static constexpr bool kFromMemory = false;
  // A block's number says which tile it owns.
  static constexpr bool kHasPlaces = false;
  // No tile has a bias of its own, which is added to its logits, or a divisor of its weights.
  static constexpr bool kHasBias = false;
  // The gradients of keys and values have no addends.
  static constexpr bool kHasAddend = false;

  struct ForwardParameters {};
  struct BackwardParameters {};
  static ForwardParameters parameters(const ForwardParams&) { return {}; }
  static BackwardParameters parameters(const BackwardParams&, const int*) { return {}; }

  // This returns the tiles of keys that some row of a tile sees, or one split's share of them.
  template <class Tile, class Args, class Place>
  static __device__ __forceinline__ BandTiles<Tile::kN> keys(const Args& args, const Place& place) {
    constexpr int kKeys = Tile::kN;
    const Band& band = place.sequence.band;
    const int last_row = min(place.row_begin + Tile::kM, place.row_end) - 1;
    const int begin = band.visible(args.group.divide(place.row_begin)).first / kKeys;
    const int end = max((max(band.visible(args.group.divide(last_row)).end, 0) + kKeys - 1) / kKeys, begin);
    const int share = (end - begin + args.splits.divisor() - 1) / args.splits.divisor();
    const int first = min(begin + place.split * share, end);
    return {first, min(first + share, end)};
  }

  // This returns the tiles of rows of a head that see some key of a tile.
  template <class Tile, class Args, class Sequence>
  static __device__ __forceinline__ BandTiles<Tile::kM> rows(const Args& args, const Sequence& sequence, int, int,
                                                             int key_begin) {
    constexpr int kRows = Tile::kM;
    const Visible queries = sequence.band.seen_by(key_begin, key_begin + Tile::kN, sequence.length_q);
    const int begin = queries.first * args.group.divisor() / kRows;
    return {begin, max((queries.end * args.group.divisor() + kRows - 1) / kRows, begin)};
  }

  // This counts the tiles of keys that add to the tile of rows from row_begin on before the one from key_begin on does:
  // they are all that its first query sees up to there.
  template <int kKeys, class Args, int kRows>
  static __device__ __forceinline__ int before(const Args& args, const Band& band, int row_begin, int key_begin,
                                               const BandTiles<kRows>&, int) {
    return (key_begin - band.visible(args.group.divide(row_begin)).first / kKeys * kKeys) / kKeys;
  }
};

}  // namespace attnx::cuda

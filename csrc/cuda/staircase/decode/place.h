// This says what a block of decoding is about.
#pragma once

#include "cuda/staircase/decode/arguments.h"

namespace attnx::cuda {

enum class DecodeKind { kPlain, kRefined, kTail };

// This is what a block computes at a time: several tiles of 32 tokens in windows that the first plane alone has, one
// such tile in a window that has further planes, or 16 tokens of the tail.
struct DecodeTurn {
  DecodeKind kind;
  int first, tiles;  // the first token

  __device__ int tile() const { return first / kDecodeTokens; }
};

// This is a block's share: the rows of one key head, and every so many turns of the tokens that they see.
struct DecodePlace {
  int batch, head_k, row_block, split;
  std::int64_t number;  // of all row blocks
  StaircaseState state;
  int length, length_q;
  int first_row, rows;  // of those of the key head

  int turn_tiles;                          // of a plain turn
  int windows, tail_first, visible;        // visible: the most tokens that a row sees
  int plain_tiles;                         // of the windows that the first plane alone has
  int plain_turns, code_turns, all_turns;  // of these windows, of all windows, of all
  int blocks;                              // that have a turn, the first ones

  __device__ DecodePlace(const DecodeArguments& args, int most_rows, int turn_tiles)
      : split(int(blockIdx.x / args.row_blocks % args.splits)), state(args.cache.of(0)), turn_tiles(turn_tiles) {
    row_block = int(blockIdx.x % args.row_blocks);
    const int head = int(blockIdx.x / args.row_blocks / args.splits);
    batch = head / int(args.cache.heads);
    head_k = head % int(args.cache.heads);
    number = std::int64_t(head) * args.row_blocks + row_block;
    state = args.cache.of(batch);
    const StaircaseLayout& layout = args.cache.layout;
    length = int(state.length());
    length_q = args.query_lengths ? int(args.query_lengths[batch]) : args.length_q;
    first_row = row_block * most_rows;
    rows = min(most_rows, length_q * args.heads_on_key_head.divisor() - first_row);
    visible = rows > 0 ? end(args, rows - 1) : 0;

    windows = args.window_tiles.divide(max(0, length - int(layout.residual)) / kDecodeTokens);
    tail_first = windows * int(layout.window);
    const int refined = layout.planes > 1 ? int(state.refined(1)) : 0;
    const int tiles = (min(tail_first, visible) + kDecodeTokens - 1) / kDecodeTokens;
    plain_tiles = min(tiles, (windows - refined) * args.window_tiles.divisor());
    plain_turns = (plain_tiles + turn_tiles - 1) / turn_tiles;
    code_turns = plain_turns + tiles - plain_tiles;
    all_turns = code_turns + max(0, visible - tail_first + kTailTokens - 1) / kTailTokens;
    blocks = max(1, min(args.splits, all_turns));
  }

  // A row of the block is this query of this head.
  __device__ __forceinline__ int query(const DecodeArguments& args, int row, int& head) const {
    const int query = args.heads_on_key_head.divide(first_row + row), group = args.heads_on_key_head.divisor();
    head = head_k * group + first_row + row - query * group;
    return query;
  }
  // It sees the tokens before this one.
  __device__ __forceinline__ int end(const DecodeArguments& args, int row) const {
    if (!args.causal) return length;
    return max(0, min(length, args.heads_on_key_head.divide(first_row + row) + 1 + length - length_q));
  }

  __device__ __forceinline__ DecodeTurn turn(int number) const {
    if (number < plain_turns) {
      const int tile = number * turn_tiles;
      return {DecodeKind::kPlain, tile * kDecodeTokens, min(turn_tiles, plain_tiles - tile)};
    }
    if (number < code_turns) return {DecodeKind::kRefined, (plain_tiles + number - plain_turns) * kDecodeTokens, 1};
    return {DecodeKind::kTail, tail_first + (number - code_turns) * kTailTokens, 1};
  }
};

}  // namespace attnx::cuda

// This says what a block and a warp of decoding are about.
#pragma once

#include "cuda/staircase/decode/arguments.h"

namespace attnx::cuda {

// This is a block's share: 8 rows of one key head, and every so many turns of the tokens that they see. A turn is 32
// tokens of codes or 16 of the tail.
struct DecodePlace {
  int batch, head_k, row_tile, split;
  std::int64_t tile;  // of all row tiles
  StaircaseState state;
  int length, length_q;
  int first_query, rows;  // rows that the tile has

  int windows, tail_first, visible;        // visible: the most tokens that a row sees
  int plain_turns, code_turns, all_turns;  // of the windows that the first plane alone has, of all windows, of all
  int blocks;                              // that have a turn, the first ones

  __device__ explicit DecodePlace(const DecodeArguments& args)
      : split(int(blockIdx.x / args.row_tiles % args.splits)), state(args.cache.of(0)) {
    row_tile = int(blockIdx.x % args.row_tiles);
    const int head = int(blockIdx.x / args.row_tiles / args.splits);
    batch = head / int(args.cache.heads);
    head_k = head % int(args.cache.heads);
    tile = std::int64_t(head) * args.row_tiles + row_tile;
    state = args.cache.of(batch);
    const StaircaseLayout& layout = args.cache.layout;
    length = int(state.length());
    length_q = args.query_lengths ? int(args.query_lengths[batch]) : args.length_q;
    const int group = args.heads_on_key_head.divisor();
    rows = min(kDecodeRows, length_q * group - row_tile * kDecodeRows);
    first_query = args.heads_on_key_head.divide(row_tile * kDecodeRows);
    const int last_query = args.heads_on_key_head.divide(row_tile * kDecodeRows + rows - 1);
    visible = args.causal ? max(0, min(length, last_query + 1 + length - length_q)) : length;

    windows = int(layout.windows_of(length));
    tail_first = windows * int(layout.window);
    const int refined = layout.planes > 1 ? int(state.refined(1)) : 0;
    code_turns = (min(tail_first, visible) + kDecodeTokens - 1) / kDecodeTokens;
    plain_turns = min(code_turns, (windows - refined) * args.window_tiles.divisor());
    all_turns = code_turns + max(0, visible - tail_first + kTailTokens - 1) / kTailTokens;
    blocks = max(1, min(args.splits, (all_turns + kDecodeWarps - 1) / kDecodeWarps));
  }

  // The first row that a warp sees less than all of is in the first query of the tile.
  __device__ int seen_by_all(bool causal) const {
    return causal ? max(0, min(length, first_query + 1 + length - length_q)) : length;
  }
};

}  // namespace attnx::cuda

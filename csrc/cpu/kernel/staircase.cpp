// What a staircase cache takes in, gives back and drops. Compiled once per instruction set.
#include "storage/staircase.h"
#include "../executor.h"
#include "arena.h"
#include "staircase/encode.h"

namespace attnx::cpu::ATTNX_ISA {

namespace {

template <class Use>
void with_input(DType dtype, Use use) {
  switch (dtype) {
    case DType::kBFloat16: return use.template operator()<BFloat16>();
    case DType::kFloat16: return use.template operator()<Float16>();
    default: return use.template operator()<float>();
  }
}

// Calls use(batch, head, worker) for each, on the executor's threads.
template <class Use>
void for_each_head(const Executor& executor, std::int64_t batch, std::int64_t heads, Use use) {
  std::int64_t next = 0;
  executor.run([&](int worker) {
    for (;;) {
      const std::int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= batch * heads) return;
      use(i / heads, i % heads, worker);
    }
  });
}

struct AppendBuffers {
  float* numbers;
  std::uint8_t* codes;
  std::int64_t bytes;

  AppendBuffers(const StaircaseLayout& layout, char* block) {
    Arena arena(block);
    numbers = arena.take<float>(layout.window * layout.head_dim);
    codes = arena.take<std::uint8_t>(layout.window * layout.head_dim);
    bytes = arena.used();
  }
};

// The keys or the values of one head.
template <class Input>
class AppendMatrix {
 public:
  AppendMatrix(const StaircaseAppendParams& p, std::int64_t batch, std::int64_t head, int which)
      : cache_(p.cache),
        layout_(p.cache.layout),
        before_(p.cache.of(batch)),
        after_{p.next_state + batch * layout_.state_size()},
        which_(which),
        codes_(cache_.codes_of(batch, head, which)),
        ranges_(cache_.ranges_of(batch, head, which)),
        old_tail_(cache_.tail_of<Input>(batch, head, which, before_.tail())),
        new_tail_(cache_.tail_of<Input>(batch, head, which, after_.tail())),
        new_(which == kKeyMatrix ? p.key : p.value),
        rows_(row_of<const Input>(new_, batch, head, 0)) {}

  void run(const AppendBuffers& b) const {
    const std::int64_t windows = layout_.windows_of(after_.length()), first = windows * layout_.window;
    for (std::int64_t w = layout_.windows_of(before_.length()); w < windows; ++w) encode(w, b);
    // A new tail takes over what stays of the old one.
    for (std::int64_t t = old_tail_ == new_tail_ ? before_.length() : first; t < after_.length(); ++t)
      convert_row(new_tail_ + (t - first) * layout_.head_dim, token(t), layout_.head_dim);
  }

 private:
  const Input* token(std::int64_t t) const {
    const std::int64_t first = layout_.windows_of(before_.length()) * layout_.window;
    return t < before_.length() ? old_tail_ + (t - first) * layout_.head_dim
                                : rows_ + (t - before_.length()) * new_.row_stride;
  }

  void encode(std::int64_t window, const AppendBuffers& b) const {
    const std::int64_t tokens = layout_.window, channels = layout_.head_dim;
    const bool keys = which_ == kKeyMatrix;
    const std::int64_t rows = keys ? channels : tokens, columns = keys ? tokens : channels;
    for (std::int64_t t = 0; t < tokens; ++t) {
      float row[kMaxHeadDim];
      float* const to = keys ? row : b.numbers + t * channels;
      convert_row(to, token(window * tokens + t), channels);
      if (!keys) continue;
      for (std::int64_t d = 0; d < channels; ++d) b.numbers[d * tokens + t] = row[d];
    }
    quantise(b.numbers, rows, columns, layout_.group, b.codes, ranges_ + 2 * window * layout_.window_ranges());
    int above = 0;
    for (int plane = 0; plane < layout_.planes; ++plane) {
      const std::int64_t slot = after_.slot(layout_, plane, window);
      if (slot < 0) return;
      std::uint32_t* const to = codes_ + layout_.plane[plane].offset + slot * layout_.window_words(plane);
      for (std::int64_t t = 0; t < tokens; t += kCodeBlock)
        for (std::int64_t d = 0; d < channels; d += kCodeBlock)
          pack_block(b.codes + (keys ? d * tokens + t : t * channels + d), columns, layout_.plane[plane].bits, above,
                     to + layout_.block_offset(plane, t, d));
      above += layout_.plane[plane].bits;
    }
  }

  const Staircase& cache_;
  const StaircaseLayout& layout_;
  StaircaseState before_, after_;
  int which_;
  std::uint32_t* codes_;
  std::uint16_t* ranges_;
  const Input* old_tail_;
  Input* new_tail_;
  const Tensor& new_;
  const Input* rows_;
};

struct ReadBuffers {
  float *keys, *values;
  std::int64_t bytes;

  ReadBuffers(const StaircaseLayout& layout, char* block) {
    Arena arena(block);
    keys = arena.take<float>(kCodeBlock * layout.head_dim);
    values = arena.take<float>(kCodeBlock * layout.head_dim);
    bytes = arena.used();
  }
};

// Tokens first .. end - 1 of one head, as store(token, key, value) takes them.
template <class Input, class Store>
void read_tokens(const Staircase& cache, std::int64_t batch, std::int64_t head, std::int64_t first, std::int64_t end,
                 const ReadBuffers& b, Store store) {
  const StaircaseStorage<Input, FusedMultiplyAdd<float>> storage(cache, batch, head);
  const std::int64_t dim = cache.layout.head_dim, length = cache.of(batch).length();
  for (std::int64_t block = first / kCodeBlock * kCodeBlock; block < end; block += kCodeBlock) {
    const std::int64_t count = smaller(kCodeBlock, length - block);
    storage.load_key_steps(block, count, b.keys, kCodeBlock);
    storage.load_value_steps(block, count, b.values, dim);
    for (std::int64_t t = larger(first, block); t < smaller(end, block + count); ++t) {
      float key[kMaxHeadDim];
      for (std::int64_t d = 0; d < dim; ++d) key[d] = b.keys[d * kCodeBlock + t - block];
      store(t, key, b.values + (t - block) * dim);
    }
  }
}

}  // namespace

std::size_t staircase_append_workspace(const StaircaseAppendParams& p, const Executor& executor) {
  return std::size_t(executor.threads * AppendBuffers(p.cache.layout, nullptr).bytes);
}

void staircase_append(const StaircaseAppendParams& p, const Executor& executor, char* workspace) {
  const std::int64_t bytes = AppendBuffers(p.cache.layout, nullptr).bytes;
  with_input(p.dtype, [&]<class Input>() {
    // A unit is the keys or the values of a head.
    for_each_head(executor, p.batch, 2 * p.cache.heads, [&](std::int64_t batch, std::int64_t unit, int worker) {
      if (p.most_units >= 0 && batch * 2 * p.cache.heads + unit >= p.most_units) return;
      const AppendBuffers buffers(p.cache.layout, workspace + worker * bytes);
      AppendMatrix<Input>(p, batch, unit / 2, int(unit % 2)).run(buffers);
    });
  });
}

std::size_t staircase_read_workspace(const StaircaseReadParams& p, const Executor& executor) {
  return std::size_t(executor.threads * ReadBuffers(p.cache.layout, nullptr).bytes);
}

void staircase_read(const StaircaseReadParams& p, const Executor& executor, char* workspace) {
  const std::int64_t bytes = ReadBuffers(p.cache.layout, nullptr).bytes, dim = p.cache.layout.head_dim;
  with_input(p.dtype, [&]<class Input>() {
    for_each_head(executor, p.batch, p.cache.heads, [&](std::int64_t batch, std::int64_t head, int worker) {
      const ReadBuffers buffers(p.cache.layout, workspace + worker * bytes);
      const std::int64_t end = smaller(p.first + p.count, p.cache.of(batch).length());
      read_tokens<Input>(p.cache, batch, head, p.first, end, buffers,
                         [&](std::int64_t t, const float* key, const float* value) {
                           convert_row(row_of<Input>(p.key, batch, head, t - p.first), key, dim);
                           convert_row(row_of<Input>(p.value, batch, head, t - p.first), value, dim);
                         });
    });
  });
}

std::size_t staircase_crop_workspace(const StaircaseCropParams& p, const Executor& executor) {
  return std::size_t(executor.threads * ReadBuffers(p.cache.layout, nullptr).bytes);
}

// What is left of a window that was quantised becomes the tail.
void staircase_crop(const StaircaseCropParams& p, const Executor& executor, char* workspace) {
  const StaircaseLayout& layout = p.cache.layout;
  const std::int64_t bytes = ReadBuffers(layout, nullptr).bytes;
  with_input(p.dtype, [&]<class Input>() {
    for_each_head(executor, p.batch, p.cache.heads, [&](std::int64_t batch, std::int64_t head, int worker) {
      const StaircaseState before = p.cache.of(batch), after{p.next_state + batch * layout.state_size()};
      const std::int64_t windows = layout.windows_of(after.length()), first = windows * layout.window;
      if (layout.windows_of(before.length()) == windows) return;
      const ReadBuffers buffers(layout, workspace + worker * bytes);
      Input* const tail[2] = {p.cache.tail_of<Input>(batch, head, kKeyMatrix, after.tail()),
                              p.cache.tail_of<Input>(batch, head, kValueMatrix, after.tail())};
      read_tokens<Input>(p.cache, batch, head, first, after.length(), buffers,
                         [&](std::int64_t t, const float* key, const float* value) {
                           convert_row(tail[0] + (t - first) * layout.head_dim, key, layout.head_dim);
                           convert_row(tail[1] + (t - first) * layout.head_dim, value, layout.head_dim);
                         });
    });
  });
}

}  // namespace attnx::cpu::ATTNX_ISA

#include "cuda/common/device.h"
#include "cuda/common/reduce.h"
#include "cuda/delta_rule/chunk.h"
#include "cuda/delta_rule/gradients.h"

namespace attnx::cuda {

namespace {

template <class Input>
struct GradKeysMemory {
  InputRows<Input> keys, queries;
  SharedMatrix grads, others;              // [token][key_dim]
  SharedMatrix of_queries, of_keys, both;  // of pairs
  DeltaGates* gates;
  float* grad_sums;  // dG
  int key_lanes, bytes;

  __host__ __device__ GradKeysMemory(const DeltaRuleArguments& a, void* memory)
      : key_lanes(round_to(int(a.p.key_dim), 16)) {
    SharedArena arena(memory);
    keys = InputRows<Input>::take(arena, a.chunk, key_lanes);
    queries = InputRows<Input>::take(arena, a.chunk, key_lanes);
    grads = arena.take_rows(a.chunk, key_lanes);
    others = arena.take_rows(a.chunk, key_lanes);
    of_queries = arena.take_rows(a.chunk, a.chunk);
    of_keys = arena.take_rows(a.chunk, a.chunk);
    both = arena.take_rows(a.chunk, a.chunk);
    gates = arena.take<DeltaGates>(1);
    grad_sums = arena.take<float>(kMaxDeltaChunk);
    bytes = arena.bytes();
  }
};

// This is a matrix of a chunk in global memory, in which what is not there is 0.
template <class Number>
struct GlobalRows {
  const Number* data;
  std::int64_t row_stride;
  int rows, columns;

  __device__ __forceinline__ float operator()(int i, int j) const {
    return i < rows && j < columns ? float(data[i * row_stride + j]) : 0;
  }
};

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// A block makes all gradients of a chunk of a head but dV: every state, and its gradient, is there.
template <class Input>
class GradChunk {
  static constexpr int kBlocks = 4;
  using States = GlobalRows<float>;

  const DeltaGradArguments& args_;
  const DeltaRuleParams& p_;
  const GradKeysMemory<Input> m_;
  std::int64_t head_;  // of the launch
  int batch_, of_values_, of_keys_, chunk_, count_, rows_, value_lanes_;
  std::int64_t first_;

  __device__ const DeltaGates& gates() const { return *m_.gates; }
  __device__ States of_tokens(const float* x) const {
    return {x + (head_ * p_.length + first_) * p_.value_dim, p_.value_dim, count_, int(p_.value_dim)};
  }
  __device__ States of_states(const float* x) const {
    return {x + (head_ * args_.chunks + chunk_) * p_.key_dim * p_.value_dim, p_.value_dim, int(p_.key_dim),
            int(p_.value_dim)};
  }

  // This sets to(i, k) = factor(i) * rows_i . state_k.
  template <bool kExactRows, class Rows, class Factor>
  __device__ void multiply_states(const SharedMatrix& to, const Rows& rows, const States& state,
                                  const Factor& factor) const {
    for_each_split_tile<kBlocks, kDeltaThreads>(
        rows_, m_.key_lanes, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
          tile.template add_product<kExactRows, false>([&](int i, int d) { return rows(row + i, d); },
                                                       [&](int d, int k) { return state(column + k, d); }, value_lanes_,
                                                       blocks);
          tile.for_each(blocks, [&](int i, int k, float sum) { to(row + i, column + k) = factor(row + i) * sum; });
        });
  }
  // A warp has a row: this calls use(row, dot product of it and the token's) in one lane.
  template <class Use>
  __device__ void for_each_dot(const SharedMatrix& x, const InputRows<Input>& tokens, const Use& use) const {
    for (int i = threadIdx.x / 32; i < count_; i += kDeltaWarps) {
      float dot = 0;
      for (int k = threadIdx.x % 32; k < m_.key_lanes; k += 32) dot = fmaf(x(i, k), tokens(i, k), dot);
      dot = sum_of_warp(dot);
      if (threadIdx.x % 32 == 0) use(i, dot);
    }
  }
  template <class A>
  __device__ void add_rows(const SharedMatrix& to, const A& a, const InputRows<Input>& tokens) const {
    for_each_split_tile<kBlocks, kDeltaThreads>(
        rows_, m_.key_lanes, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
          tile.template add_product<false, true>([&](int i, int j) { return a(row + i, j); },
                                                 [&](int j, int k) { return tokens(j, column + k); }, rows_, blocks);
          tile.for_each(blocks, [&](int i, int k, float sum) { to(row + i, column + k) += sum; });
        });
  }
  __device__ void store(const SharedMatrix& from, float* to) const {
    to += (head_ * p_.length + first_) * p_.key_dim;
    for (int i = threadIdx.x / 32; i < count_; i += kDeltaWarps)
      for (int k = threadIdx.x % 32; k < p_.key_dim; k += 32) to[i * p_.key_dim + k] = from(i, k);
  }

  // These are scale e^(G_i - G_j) dP and M, and what both add to the differences of G.
  template <class GradOutputs, class GradValues, class Corrections>
  __device__ void differentiate_pairs(const GradOutputs& grad_outputs, const GradValues& grad_values,
                                      const Corrections& corrections) const {
    constexpr int kNarrow = 2;
    for_each_split_tile<kNarrow, kDeltaThreads>(
        rows_, rows_, [&](SplitTile<kNarrow>& of_queries, int row, int key, int blocks) {
          SplitTile<kNarrow> of_keys, products, own_products;
          if (key < row + kTileRows) {
            const auto by_column = [&](int d, int j) { return corrections(key + j, d); };
            const auto keys = [&](int k, int j) { return m_.keys(key + j, k); };
            of_queries.template add_product<true, false>([&](int i, int d) { return grad_outputs(row + i, d); },
                                                         by_column, value_lanes_, blocks);
            of_keys.template add_product<false, false>([&](int i, int d) { return grad_values(row + i, d); }, by_column,
                                                       value_lanes_, blocks);
            products.template add_product<true, true>([&](int i, int k) { return m_.queries(row + i, k); }, keys,
                                                      m_.key_lanes, blocks);
            own_products.template add_product<true, true>([&](int i, int k) { return m_.keys(row + i, k); }, keys,
                                                          m_.key_lanes, blocks);
          }
          of_queries.for_each(blocks, products, [&](int i, int j, float& grad, float product) {
            const int query = row + i, token = key + j;
            grad = token <= query ? float(p_.scale) * gates().decay(query, token) * grad : 0;
            m_.of_queries(query, token) = grad;
            m_.both(query, token) = token < query ? grad * product : 0;
          });
          of_keys.for_each(blocks, own_products, [&](int i, int j, float& grad, float product) {
            const int query = row + i, token = key + j;
            grad = token < query ? -gates().decay(query, token) * grad : 0;
            m_.of_keys(query, token) = grad;
            m_.both(query, token) += grad * product;
          });
        });
  }

  // A log decay is in its own sum and in those of all later tokens of the chunk.
  __device__ void store_gates(const States& differences, const States& z) const {
    const std::int64_t place = (args_.first_head + head_) * p_.length + first_;
    for (int i = threadIdx.x / 32; i < count_; i += kDeltaWarps) {
      float dot = 0;
      for (int d = threadIdx.x % 32; d < p_.value_dim; d += 32) dot = fmaf(differences(i, d), z(i, d), dot);
      dot = sum_of_warp(dot);
      if (threadIdx.x % 32 == 0) args_.grad_beta[place + i] = dot;
    }
    if (threadIdx.x != 0) return;
    float sum = 0;
    for (int i = count_ - 1; i >= 0; --i) args_.grad_log_decay[place + i] = sum += m_.grad_sums[i];
  }

 public:
  __device__ GradChunk(const DeltaGradArguments& args, void* memory, int index)
      : args_(args), p_(args.p), m_(args, memory), head_(index / args.chunks), chunk_(index % args.chunks) {
    const std::int64_t head = args.first_head + head_;
    batch_ = int(head / p_.heads_v);
    of_values_ = int(head % p_.heads_v);
    of_keys_ = of_values_ / int(p_.heads_v / p_.heads_k);
    first_ = std::int64_t(chunk_) * args.chunk;
    count_ = int(min(std::int64_t(args.chunk), p_.length - first_));
    rows_ = round_to(count_, kTileRows);
    value_lanes_ = round_to(int(p_.value_dim), 8);
  }

  __device__ void run() const {
    const int key_dim = int(p_.key_dim);
    load_rows(m_.keys, p_.key, batch_, of_keys_, first_, count_, rows_, 0, key_dim, m_.key_lanes);
    load_rows(m_.queries, p_.query, batch_, of_keys_, first_, count_, rows_, 0, key_dim, m_.key_lanes);
    m_.gates->read(args_, batch_, of_values_, first_, count_);
    finish_rows();
    const States state = of_states(args_.states), grad_state = of_states(args_.grad_states);
    const States differences = of_tokens(args_.differences), z = of_tokens(args_.z);
    const Input* const grad =
        args_.grad_output.data ? row_of<const Input>(args_.grad_output, batch_, of_values_, first_) : nullptr;
    const GlobalRows<Input> grad_outputs{grad, args_.grad_output.row_stride, grad ? count_ : 0, int(p_.value_dim)};
    const auto grad_values = [&](int i, int d) { return gates().beta[i] * z(i, d); };
    const auto corrections = [&](int i, int d) { return gates().beta[i] * differences(i, d); };
    const float scale = float(p_.scale);

    differentiate_pairs(grad_outputs, grad_values, corrections);
    multiply_states<true>(m_.grads, grad_outputs, state, [&](int i) { return scale * gates().from_start[i]; });
    double whole = 0;
    for (int i = threadIdx.x; i < key_dim * p_.value_dim; i += kDeltaThreads)
      whole += double(state.data[i]) * grad_state.data[i];
    whole = sum_of_block<kDeltaThreads>(whole);
    for (int i = threadIdx.x; i < count_; i += kDeltaThreads) {
      float sum = i == count_ - 1 ? gates().whole() * float(whole) : 0;
      for (int j = 0; j < i; ++j) sum += m_.both(i, j);
      float later = 0;
      for (int j = i + 1; j < count_; ++j) later += m_.both(j, i);
      m_.grad_sums[i] = sum - later;
    }
    __syncthreads();
    for_each_dot(m_.grads, m_.queries, [&](int i, float dot) { m_.grad_sums[i] += dot; });
    __syncthreads();
    add_rows(m_.grads, m_.of_queries, m_.keys);
    __syncthreads();
    store(m_.grads, args_.grad_queries);
    __syncthreads();

    multiply_states<false>(m_.grads, grad_values, state, [&](int i) { return -gates().from_start[i]; });
    multiply_states<false>(m_.others, corrections, grad_state, [&](int i) { return gates().to_end[i]; });
    __syncthreads();
    for_each_dot(m_.grads, m_.keys, [&](int i, float dot) { m_.grad_sums[i] += dot; });
    // These are the gradients of e^(G_n - G_i), which is 1 for the last token. `both` is free by now.
    for_each_dot(m_.others, m_.keys, [&](int i, float dot) { m_.both(0, i) = i < count_ - 1 ? dot : 0; });
    __syncthreads();
    if (threadIdx.x == 0) {
      float sum = 0;
      for (int i = 0; i < count_ - 1; ++i) {
        m_.grad_sums[i] -= m_.both(0, i);
        sum += m_.both(0, i);
      }
      m_.grad_sums[count_ - 1] += sum;
    }
    add_rows(m_.grads, [&](int j, int i) { return m_.of_queries(i, j); }, m_.queries);
    add_rows(m_.grads, [&](int i, int j) { return i > j ? m_.of_keys(i, j) : m_.of_keys(j, i); }, m_.keys);
    __syncthreads();
    for (int i = threadIdx.x / 32; i < rows_; i += kDeltaWarps)
      for (int k = threadIdx.x % 32; k < m_.key_lanes; k += 32) m_.grads(i, k) += m_.others(i, k);
    __syncthreads();
    store(m_.grads, args_.grad_keys);
    store_gates(differences, z);
  }
};

template <class Input>
__global__ void __launch_bounds__(kDeltaThreads, 2)
    attnx_delta_rule_grad_keys(const __grid_constant__ DeltaGradArguments args) {
  extern __shared__ uint4 shared[];
  GradChunk<Input>(args, shared, int(blockIdx.x)).run();
}

}  // namespace

int delta_grad_keys_bytes(const DeltaRuleArguments& args) { return GradKeysMemory<__half>(args, nullptr).bytes; }

void launch_delta_grad_keys(const DeltaGradArguments& args, cudaStream_t stream) {
  with_delta_dtype(args.p.dtype, [&]<class Input>() {
    launch_kernel("attnx_delta_rule_grad_keys", attnx_delta_rule_grad_keys<Input>, args.heads * args.chunks,
                  kDeltaThreads, delta_grad_keys_bytes(args), stream, args);
  });
}

}  // namespace attnx::cuda

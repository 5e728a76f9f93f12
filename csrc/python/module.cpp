// This is attnx._C. Importing it loads libattnx, which registers torch.ops.attnx.*; it also tells what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "attnx/capability.h"
#include "attnx/environment.h"
#include "attnx/policies.h"
#include "cpu/attention.h"
#include "torch/cuda_hooks.h"
#include "torch/staircase_hooks.h"

namespace py = pybind11;

namespace {

constexpr bool kWithCuda = ATTNX_WITH_CUDA;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::object if_with_cuda(const char* text) { return kWithCuda ? py::object(py::str(text)) : py::none(); }

py::dict build_info() {
  py::dict info;
  info["version"] = ATTNX_VERSION;
  info["compiler"] = ATTNX_COMPILER;
  info["cpu_instruction_sets"] = split(ATTNX_ISAS);
  info["cuda"] = if_with_cuda(ATTNX_CUDA_VERSION);
  info["cuda_architectures"] = split(ATTNX_CUDA_ARCHITECTURES);
  info["cudart"] = if_with_cuda(ATTNX_CUDART);
  info["torch_target"] = ATTNX_TORCH_TARGET;
  return info;
}

bool cuda_emulated() {
  if constexpr (kWithCuda) return attnx::ops::cuda_emulated();
  return false;
}

attnx::DType sixteen_bits(const std::string& dtype) {
  if (dtype == "bfloat16") return attnx::DType::kBFloat16;
  if (dtype == "float16") return attnx::DType::kFloat16;
  throw std::invalid_argument("dtype: expected bfloat16 or float16, got " + dtype);
}

// This says where a tensor lies by its address, and its strides over batch, heads and rows.
using Layout = std::array<std::int64_t, 4>;

attnx::Tensor tensor_of(const std::optional<Layout>& layout, std::int64_t heads, std::int64_t rows,
                        std::int64_t features) {
  if (!layout) return {nullptr, heads * rows * features, rows * features, features};
  return {reinterpret_cast<void*>((*layout)[0]), (*layout)[1], (*layout)[2], (*layout)[3]};
}

py::dict as_dict(const attnx::cuda::KernelDescription& x) {
  py::dict d;
  d["kernel"] = x.kernel;
  d["mainloop"] = x.mainloop;
  d["rows"] = x.rows;
  d["keys"] = x.keys;
  d["head_dim"] = x.head_dim;
  d["aligned"] = x.aligned;
  d["splits"] = x.splits;
  d["why_not_sm90"] = x.why_not_sm90;
  return d;
}

// This is what a staircase cache is made of: levels, window, group, residual and the most tokens.
using CacheSizes = std::tuple<std::vector<std::int64_t>, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

attnx::Staircase cache_of(const CacheSizes& sizes, std::int64_t heads, std::int64_t head_dim) {
  const auto& [levels, window, group, residual, max_length] = sizes;
  attnx::Staircase cache;
  cache.layout =
      attnx::StaircaseLayout(levels.data(), int(levels.size()), window, group, residual, head_dim, max_length);
  cache.heads = heads;
  return cache;
}

// It describes the kernel that a call of these sizes, and of these tensors where they are given, would run.
template <bool kBackward>
py::dict cuda_kernel(const std::string& op, const std::string& dtype, std::int64_t batch, std::int64_t heads_q,
                     std::int64_t heads_k, std::int64_t length_q, std::int64_t length_k, std::int64_t head_dim,
                     std::int64_t value_dim, std::pair<std::int64_t, std::int64_t> window,
                     std::pair<std::int64_t, std::int64_t> packed_rows,
                     std::pair<std::int64_t, std::int64_t> block_size, const std::optional<Layout>& query,
                     const std::optional<Layout>& key, const std::optional<Layout>& value,
                     const std::optional<CacheSizes>& cache, std::pair<std::int64_t, std::int64_t> clusters_and_slots,
                     bool terms) {
  static constexpr std::int32_t kPresent = 0;  // only whether there is one is looked at
  attnx::Gather gather;
  std::tie(gather.clusters, gather.queries.slots) = clusters_and_slots;
  const auto describe = [&](attnx::AttentionParams& p) {
    p.score = attnx::Score::kSoftmax;
    for (const attnx::ScorePolicy& row : attnx::kScores)
      if (op == std::string(row.name) + "_attention") p.score = row.score;
    p.dtype = sixteen_bits(dtype);
    p.batch = batch;
    p.heads_q = heads_q;
    p.heads_k = heads_k;
    p.length_q = length_q;
    p.length_k = length_k;
    p.head_dim = head_dim;
    p.value_dim = value_dim;
    std::tie(p.window_left, p.window_right) = window;
    std::tie(p.packed_rows_q, p.packed_rows_k) = packed_rows;
    if (p.packed_rows_q > 0) p.cu_seqlens_q = p.key_starts = p.key_ends = &kPresent;
    std::tie(p.block_q, p.block_k) = block_size;
    if (p.block_q > 0) p.key_blocks.counts = &kPresent;
    if (op == "routing_attention") p.gather = &gather;
    if (terms) p.terms.softcap = 1;  // only whether there is one is looked at
    p.query = tensor_of(query, heads_q, length_q, head_dim);
    p.key = tensor_of(key, heads_k, length_k, head_dim);
    p.value = tensor_of(value, heads_k, length_k, value_dim);
  };
  if constexpr (!kBackward) {
    attnx::ForwardParams p;
    describe(p);
    p.output = tensor_of(std::nullopt, heads_q, length_q, value_dim);
    const attnx::Staircase staircase = cache ? cache_of(*cache, heads_k, head_dim) : attnx::Staircase();
    if (cache) p.cache = &staircase;
    return as_dict(attnx::ops::describe_cuda_kernel(p));
  } else {
    attnx::BackwardParams p;
    describe(p);
    p.output = p.grad_output = tensor_of(std::nullopt, heads_q, length_q, value_dim);
    p.grad_query = tensor_of(std::nullopt, heads_q, length_q, head_dim);
    p.grad_key = tensor_of(std::nullopt, heads_k, length_k, head_dim);
    p.grad_value = tensor_of(std::nullopt, heads_k, length_k, value_dim);
    return as_dict(attnx::ops::describe_cuda_kernel(p));
  }
}

void cuda_sigmoid_weights(std::uintptr_t logits, std::uintptr_t weights, std::int64_t n, const std::string& dtype,
                          bool exact) {
  attnx::ops::cuda_sigmoid_weights(reinterpret_cast<const float*>(logits), reinterpret_cast<float*>(weights), n,
                                   sixteen_bits(dtype), exact);
}

void cuda_critical_blocks(std::uintptr_t labels, std::int64_t heads, std::int64_t query_blocks, std::int64_t key_blocks,
                          bool transposed, std::uintptr_t counts, std::uintptr_t indices) {
  attnx::ops::cuda_critical_blocks({.heads = heads,
                                    .query_blocks = query_blocks,
                                    .key_blocks = key_blocks,
                                    .labels = reinterpret_cast<const std::int8_t*>(labels),
                                    .transposed = transposed,
                                    .width = transposed ? query_blocks : key_blocks,
                                    .counts = reinterpret_cast<std::int32_t*>(counts),
                                    .indices = reinterpret_cast<std::int32_t*>(indices)});
}

std::size_t cuda_block_products(const Layout& query, const Layout& key, const std::string& dtype, std::int64_t batch,
                                std::int64_t heads_q, std::int64_t heads_k, std::int64_t length_q,
                                std::int64_t length_k, std::int64_t head_dim,
                                std::pair<std::int64_t, std::int64_t> block_size, bool smooth_k, double scale,
                                std::uintptr_t products, std::uintptr_t workspace) {
  attnx::BlockMapParams p;
  p.dtype = sixteen_bits(dtype);
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_k = heads_k;
  p.length_q = length_q;
  p.length_k = length_k;
  p.head_dim = head_dim;
  p.query = tensor_of(query, heads_q, length_q, head_dim);
  p.key = tensor_of(key, heads_k, length_k, head_dim);
  std::tie(p.block_q, p.block_k) = block_size;
  p.smooth_k = smooth_k;
  p.scale = scale;
  return attnx::ops::cuda_block_products(p, reinterpret_cast<float*>(products), reinterpret_cast<void*>(workspace));
}

void cuda_normalise_rows(const Layout& rows, const std::string& dtype, std::int64_t batch, std::int64_t heads,
                         std::int64_t length, std::int64_t head_dim, std::uintptr_t normalised) {
  attnx::RouteParams p;
  p.dtype = dtype == "float32" ? attnx::DType::kFloat32 : sixteen_bits(dtype);
  p.batch = batch;
  p.heads = heads;
  p.length = length;
  p.head_dim = head_dim;
  p.rows = tensor_of(rows, heads, length, head_dim);
  attnx::ops::cuda_normalise_rows(p, reinterpret_cast<float*>(normalised));
}

void cuda_pad_centroids(std::uintptr_t centroids, std::int64_t heads, std::int64_t clusters, std::int64_t head_dim,
                        std::uintptr_t padded) {
  attnx::RouteParams p;
  p.heads = heads;
  p.clusters = clusters;
  p.head_dim = head_dim;
  p.centroids = reinterpret_cast<const float*>(centroids);
  attnx::ops::cuda_pad_centroids(p, reinterpret_cast<float*>(padded));
}

// This says where a matrix of each problem lies by its address, and its strides over problems and rows.
using Matrix = std::array<std::int64_t, 3>;

void cuda_routing_scores(std::int64_t problems, std::int64_t rows, std::int64_t centroids, std::int64_t features,
                         const Matrix& row_matrix, const Matrix& centroid_matrix, const Matrix& score_matrix) {
  const auto matrix = [](const Matrix& m) {
    return attnx::cuda::ScoreMatrix{reinterpret_cast<float*>(m[0]), m[1], m[2]};
  };
  attnx::ops::cuda_routing_scores(
      {problems, rows, centroids, features, matrix(row_matrix), matrix(centroid_matrix), matrix(score_matrix)});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and test hooks of attnx; importing it registers torch.ops.attnx.";
  m.attr("version") = ATTNX_VERSION;
  m.def("build_info", build_info, "What this binary was built with, and for.");
  m.def("capabilities", [] { return std::string(attnx::kCapabilitiesJson); }, "The capability table, JSON.");
  m.def("cpu_instruction_sets", attnx::cpu::instruction_sets, "Those that were built and that this machine runs.");
  m.def("cpu_instruction_set", attnx::cpu::instruction_set, "The one in use.");
  m.def("set_cpu_instruction_set", attnx::cpu::use_instruction_set, py::arg("name"),
        "Use this one from now on, in the whole process. For tests and comparisons.");
  m.def("interrupt_staircase_append", attnx::ops::interrupt_staircase_append, py::arg("units"),
        "For tests: appends write so many heads' keys or values from now on and then throw; -1: all of them.");
  m.attr("cuda_on_host") = attnx::kCudaOnHost;
  m.def("cuda_emulated", cuda_emulated, "Whether there are CUDA kernels, on a runtime that is the emulator.");
  if constexpr (kWithCuda) {
    const auto def_kernel = [&](const char* name, auto function) {
      m.def(name, function, py::arg("operator"), py::arg("dtype"), py::arg("batch"), py::arg("heads_q"),
            py::arg("heads_k"), py::arg("length_q"), py::arg("length_k"), py::arg("head_dim"), py::arg("value_dim"),
            py::arg("window") = std::pair(-1, -1), py::arg("packed_rows") = std::pair(0, 0),
            py::arg("block_size") = std::pair(0, 0), py::arg("query") = py::none(), py::arg("key") = py::none(),
            py::arg("value") = py::none(), py::arg("cache") = py::none(),
            py::arg("clusters_and_slots") = std::pair(0, 0), py::arg("terms") = false,
            "The kernel that the current device would run.");
    };
    def_kernel("cuda_forward_kernel", cuda_kernel<false>);
    def_kernel("cuda_backward_kernel", cuda_kernel<true>);
    m.def("cuda_mainloop", attnx::ops::cuda_mainloop, "Which one is asked for: auto, sm80, sm90 or decode.");
    m.def("set_cuda_mainloop", attnx::ops::set_cuda_mainloop, py::arg("name"),
          "Ask for this one from now on, in all threads.");
    m.def("cuda_sigmoid_weights", cuda_sigmoid_weights, py::arg("logits"), py::arg("weights"), py::arg("n"),
          py::arg("dtype"), py::arg("exact"),
          "For tests: the sigmoid of n float32 in device memory as the kernels compute it, or by the exact formula.");
    m.def("cuda_critical_blocks", cuda_critical_blocks, py::arg("labels"), py::arg("heads"), py::arg("query_blocks"),
          py::arg("key_blocks"), py::arg("transposed"), py::arg("counts"), py::arg("indices"),
          "For tests: the lists of the critical blocks of a map, in device memory.");
    m.def("cuda_block_products", cuda_block_products, py::arg("query"), py::arg("key"), py::arg("dtype"),
          py::arg("batch"), py::arg("heads_q"), py::arg("heads_k"), py::arg("length_q"), py::arg("length_k"),
          py::arg("head_dim"), py::arg("block_size"), py::arg("smooth_k"), py::arg("scale"), py::arg("products"),
          py::arg("workspace"),
          "For tests: the products of pooled blocks, in device memory. It returns the bytes that the workspace takes, "
          "and does no more where that is 0.");
    m.def("cuda_normalise_rows", cuda_normalise_rows, py::arg("rows"), py::arg("dtype"), py::arg("batch"),
          py::arg("heads"), py::arg("length"), py::arg("head_dim"), py::arg("normalised"),
          "For tests: the rows that routing compares with centroids, in device memory.");
    m.def("cuda_pad_centroids", cuda_pad_centroids, py::arg("centroids"), py::arg("heads"), py::arg("clusters"),
          py::arg("head_dim"), py::arg("padded"), "For tests: the centroids that it compares with, in device memory.");
    m.def("cuda_routing_scores", cuda_routing_scores, py::arg("problems"), py::arg("rows"), py::arg("centroids"),
          py::arg("features"), py::arg("row_matrix"), py::arg("centroid_matrix"), py::arg("score_matrix"),
          "For tests: their products, in device memory.");
  }
}

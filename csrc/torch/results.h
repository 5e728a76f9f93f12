// What attention operators return is allocated here and written into the parameters of kernels.
#pragma once

#include "arguments.h"

namespace attnx::ops {

struct Outputs {
  StableTensor output, logsumexp;
  ATTNX_FIELDS(output, logsumexp)
};
struct OutputGradients {
  StableTensor grad_output, grad_logsumexp;
  ATTNX_FIELDS(grad_output, grad_logsumexp)
};
struct InputGradients {
  StableTensor grad_query, grad_key, grad_value;
  ATTNX_FIELDS(grad_query, grad_key, grad_value)
};

// Results are allocated uninitialised: rows of dim features for each row of like, with the heads inside the rows in
// memory where like has them so. The dtype is that of like where it is not given.
StableTensor empty_rows(const StableTensor& like, std::int64_t dim, std::optional<ScalarType> dtype = std::nullopt);
StableTensor empty_logsumexp(const StableTensor& query);

// It allocates the results of a kernel and tells the kernel where they are.
InputGradients empty_gradients(const Inputs& inputs, BackwardParams& params);

// It allocates the output and tells the kernel where it is.
StableTensor empty_output(const Inputs& inputs, ForwardParams& params);

// It allocates the outputs and tells the forward kernel where they are. The logsumexp of scores without one is 0.
Outputs empty_outputs(const Inputs& inputs, ForwardParams& params);

// It allocates the outputs and runs the forward kernel.
Outputs run_forward(const Target& target, const Inputs& inputs, ForwardParams& params);

// These read a tensor that a backward gets, which has the shape of the output, or a number for each of its rows.
Tensor read_output(const char* name, const StableTensor& x, const Inputs& inputs);
Tensor read_logsumexp(const char* name, const StableTensor& x, const Inputs& inputs);
void read_outputs(const OutputGradients& gradients, const Outputs& outputs, const Inputs& inputs,
                  BackwardParams& params);

// It allocates the gradient of one number per head as kernels sum it for each sequence, (batch, heads) in double, and
// returns none where the call has no such number.
std::optional<StableTensor> empty_sums(const std::optional<StableTensor>& parameter, const StableTensor& query,
                                       const AttentionParams& params);
// The result is (heads,) in the type of sums, and zeros where there are no sums.
StableTensor sum_over_batch(const std::optional<StableTensor>& sums, const Target& target);

// These are the gradients of all numbers per head of a group of arguments. That of "bias" is called "grad_bias".
template <class Group>
class HeadGradients {
 public:
  HeadGradients(const Target& target, const Group& group, BackwardParams& params) {
    for_each_head_parameter(group, [&](std::string_view, const auto& parameter) {
      tensors_.push_back(empty_sums(parameter.tensor, target.tensor, params));
      if (tensors_.back()) params.*parameter.kGradient = data<double>(*tensors_.back());
    });
  }
  // It is called once the kernel has run.
  void finish(const Target& target) {
    for (auto& x : tensors_) x = sum_over_batch(x, target);
  }

  static void describe(std::vector<std::string>& list) {
    for_each_field_type<Group>([&]<class Field>(std::string_view name, std::type_identity<Field>) {
      if constexpr (requires { Field::kGradient; }) list.push_back("Tensor grad_" + std::string(name));
    });
  }
  void box(StableIValue*& next) const {
    for (const auto& x : tensors_) *next++ = torch::stable::detail::from(*x);
  }

 private:
  std::vector<std::optional<StableTensor>> tensors_;
};

template <class Group>
using Gradients = std::tuple<InputGradients, HeadGradients<Group>>;

// It allocates the gradients, runs the backward kernel and sums what the kernel left for each sequence.
template <class Group>
Gradients<Group> run_backward(const Target& target, const Inputs& inputs, const Group& group, BackwardParams& params) {
  Gradients<Group> gradients{empty_gradients(inputs, params), HeadGradients<Group>(target, group, params)};
  run(params, target);
  std::get<1>(gradients).finish(target);
  return gradients;
}

}  // namespace attnx::ops

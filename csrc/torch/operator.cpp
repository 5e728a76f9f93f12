#include "operator.h"

#include <algorithm>

#include "attnx/capability.h"

namespace attnx::ops {

template <>
std::string unbox<std::string>(StableIValue value) {
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  std::size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string result(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return result;
}

std::string schema_of(const char* name, const std::vector<std::string>& arguments,
                      const std::vector<std::string>& results) {
  const auto join = [](const std::vector<std::string>& list) {
    std::string text;
    for (const std::string& item : list) text += (text.empty() ? "" : ", ") + item;
    return text;
  };
  const bool unnamed = results == std::vector<std::string>{"Tensor"};
  std::string text = std::string(name).append("(").append(join(arguments)).append(") -> ");
  text.append(unnamed ? "" : "(").append(join(results)).append(unnamed ? "" : ")");
  char letter = 'a';  // it tells apart the tensors that are written to
  for (auto at = text.find("(!)"); at != text.npos; at = text.find("(!)")) text.insert(at + 1, 1, letter++);
  return text;
}

void check_placement(const std::vector<NamedTensor>& tensors) {
  const auto is_query = [](const NamedTensor& x) { return x.name == "query"; };
  auto first = std::find_if(tensors.begin(), tensors.end(), is_query);
  if (first == tensors.end()) first = tensors.begin();
  for (const auto& [name, x] : tensors) {
    if (x->is_cpu() && first->tensor->is_cpu()) continue;
    const std::string expected = device_of(*first->tensor), got = device_of(*x);
    check(got == expected, name, ": expected a tensor on ", expected, " like ", first->name, ", got one on ", got);
  }
}

using torch::stable::detail::StableLibrary;

Registration::Registration(const char* system, OnHost on_host, std::initializer_list<Operator> operators)
    : schemas_(StableLibrary::Kind::FRAGMENT, "attnx", nullptr, __FILE__, __LINE__),
      cpu_(StableLibrary::Kind::IMPL, "attnx", "CPU", __FILE__, __LINE__) {
  const bool has_cuda = ATTNX_WITH_CUDA && find_capability(system, "cuda");
  if (has_cuda) cuda_.emplace(StableLibrary::Kind::IMPL, "attnx", "CUDA", __FILE__, __LINE__);
  for (const Operator& op : operators) {
    schemas_.def(op.schema.c_str());
    const bool on_cuda = kCudaOnHost && find_capability(system, "cuda");  // else the CPU's kernels run
    if (on_cuda || !kCudaOnHost || on_host == OnHost::kServed) cpu_.impl(op.name, op.call);
    if (cuda_) cuda_->impl(op.name, op.call);
  }
}

}  // namespace attnx::ops

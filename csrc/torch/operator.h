// An operator is made from one function. The function takes groups of arguments and returns groups of results, structs
// whose members ATTNX_FIELDS lists; the operator's schema and the boxed form that torch calls follow from its
// signature.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "attnx/environment.h"  // its switches are then set before anything is registered
#include "attnx/out_of_memory.h"
#include "check.h"

// This lists the members of a group, in the order in which they are declared.
#define ATTNX_FIELDS(...)                             \
  static constexpr const char* kNames = #__VA_ARGS__; \
  auto fields() { return std::tie(__VA_ARGS__); }     \
  auto fields() const { return std::tie(__VA_ARGS__); }

namespace attnx::ops {

// This is an int that torch.compile may leave symbolic.
struct SymInt {
  using OnStack = std::int64_t;
  static constexpr const char* kSchemaType = "SymInt";

  std::int64_t value;

  operator std::int64_t() const { return value; }
};

// This is a tensor that the operator writes to.
struct MutableTensor : StableTensor {
  using OnStack = StableTensor;
  static constexpr const char* kSchemaType = "Tensor(!)";  // a letter follows in the whole schema
};

// This is the name that schemas have for a type of fields.
template <class T>
inline constexpr std::string_view kSchemaType = T::kSchemaType;
#define ATTNX_SCHEMA_TYPE(name, ...) \
  template <>                        \
  inline constexpr std::string_view kSchemaType<__VA_ARGS__> = name;
ATTNX_SCHEMA_TYPE("Tensor", StableTensor)
ATTNX_SCHEMA_TYPE("Tensor?", std::optional<StableTensor>)
ATTNX_SCHEMA_TYPE("bool", bool)
ATTNX_SCHEMA_TYPE("int", std::int64_t)
ATTNX_SCHEMA_TYPE("int[]", std::vector<std::int64_t>)
ATTNX_SCHEMA_TYPE("float", double)
ATTNX_SCHEMA_TYPE("float?", std::optional<double>)
ATTNX_SCHEMA_TYPE("str", std::string)
#undef ATTNX_SCHEMA_TYPE

// It takes a value from torch's stack, which hands over what it owns.
template <class T>
T unbox(StableIValue value) {
  if constexpr (requires { typename T::OnStack; }) {
    return T{torch::stable::detail::to<typename T::OnStack>(value)};
  } else {
    return torch::stable::detail::to<T>(value);
  }
}
// torch's own conversion, as of 2.13, loses a copy of the string in each call.
template <>
std::string unbox<std::string>(StableIValue value);

// It returns the name of field i of a list like "query, key, value".
constexpr std::string_view field_name(std::string_view names, std::size_t i) {
  for (; i > 0; --i) names.remove_prefix(names.find(", ") + 2);
  return names.substr(0, names.find(", "));
}

// It calls visit(name, field) for each field of a group.
template <class Group, class Visit>
void for_each_field(Group& group, const Visit& visit) {
  std::apply(
      [&](auto&... field) {
        [[maybe_unused]] std::size_t i = 0;
        (visit(field_name(Group::kNames, i++), field), ...);
      },
      group.fields());
}

// This is a tuple of references to the fields.
template <class Group>
using FieldTypes = decltype(std::declval<Group&>().fields());

// It calls visit(name, std::type_identity<type>) for each field of a group, and needs no group at hand.
template <class Group, class Visit>
void for_each_field_type(const Visit& visit) {
  [&]<class... Fields>(std::type_identity<std::tuple<Fields&...>>) {
    [[maybe_unused]] std::size_t i = 0;
    (visit(field_name(Group::kNames, i++), std::type_identity<Fields>()), ...);
  }(std::type_identity<FieldTypes<Group>>());
}

// It adds the fields of a group to a list as a schema has them, "Tensor query" and so on.
template <class Group>
void describe(std::vector<std::string>& list) {
  if constexpr (std::is_same_v<Group, StableTensor>) {
    list.push_back("Tensor");
  } else if constexpr (requires { Group::describe(list); }) {
    Group::describe(list);
  } else {
    for_each_field_type<Group>([&]<class Field>(std::string_view name, std::type_identity<Field>) {
      list.push_back(std::string(kSchemaType<Field>).append(" ").append(name));
    });
  }
}

// It takes a group from the stack and moves `next` past it. Braces promise that this goes from the left to the right.
template <class Group>
Group unbox_group(StableIValue*& next) {
  return [&]<class... Fields>(std::type_identity<std::tuple<Fields&...>>) {
    return Group{unbox<Fields>(*next++)...};
  }(std::type_identity<FieldTypes<Group>>());
}

template <class Group>
void box_group(const Group& group, StableIValue*& next) {
  if constexpr (std::is_same_v<Group, StableTensor>) {
    *next++ = torch::stable::detail::from(group);
  } else if constexpr (requires { group.box(next); }) {
    group.box(next);
  } else {
    for_each_field(group, [&](std::string_view, const StableTensor& x) { *next++ = torch::stable::detail::from(x); });
  }
}

// It adds the tensors of a group to a list.
struct NamedTensor {
  std::string_view name;
  const StableTensor* tensor;
};
template <class Group>
void list_tensors(const Group& group, std::vector<NamedTensor>& list) {
  for_each_field(group, [&]<class Field>(std::string_view name, const Field& field) {
    if constexpr (std::is_convertible_v<const Field*, const StableTensor*>) {
      list.push_back({name, &field});
    } else if constexpr (std::is_same_v<Field, std::optional<StableTensor>>) {
      if (field) list.push_back({name, &*field});
    } else if constexpr (requires { field.kGradient; }) {
      if (field.tensor) list.push_back({name, &*field.tensor});
    }
  });
}
// It checks that all lie where query does, or the first where there is no query. Each operator has this one rule.
void check_placement(const std::vector<NamedTensor>& tensors);

// A function returns nothing, a tensor without a name, a group, or a tuple of groups.
template <class Result>
struct Results {
  static void describe(std::vector<std::string>& list) { ops::describe<Result>(list); }
  static void box(const Result& result, StableIValue* next) { box_group(result, next); }
};
template <>
struct Results<void> {
  static void describe(std::vector<std::string>&) {}
};
template <class... Groups>
struct Results<std::tuple<Groups...>> {
  static void describe(std::vector<std::string>& list) { (ops::describe<Groups>(list), ...); }
  static void box(const std::tuple<Groups...>& results, StableIValue* next) {
    std::apply([&](const auto&... group) { (box_group(group, next), ...); }, results);
  }
};

// It returns "name(Tensor query, ...) -> (Tensor output, ...)".
std::string schema_of(const char* name, const std::vector<std::string>& arguments,
                      const std::vector<std::string>& results);

struct Operator {
  const char* name;
  std::string schema;
  void (*call)(StableIValue* stack, std::uint64_t arguments, std::uint64_t results);
};

template <auto kFunction>
struct Boxed;

template <class Result, class... Groups, Result (*kFunction)(const Groups&...)>
struct Boxed<kFunction> {
  static inline const char* name = "";

  static std::string schema(const char* name) {
    std::vector<std::string> arguments, results;
    (describe<Groups>(arguments), ...);
    Results<Result>::describe(results);
    return schema_of(name, arguments, results);
  }
  static void call(StableIValue* stack, std::uint64_t, std::uint64_t) {
    try {
      run(stack);
    } catch (const OutOfMemory& error) {
      throw std::runtime_error(std::string(name).append(": ").append(error.what()));
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(std::string(name).append(": memory: expected some for the call's own lists, got none"));
    }
  }

 private:
  static void run(StableIValue* stack) {
    StableIValue* next = stack;
    const std::tuple<Groups...> groups{unbox_group<Groups>(next)...};
    std::vector<NamedTensor> tensors;
    std::apply([&](const Groups&... group) { (list_tensors(group, tensors), ...); }, groups);
    check_placement(tensors);
    if constexpr (std::is_void_v<Result>) {
      std::apply(kFunction, groups);
    } else {
      Results<Result>::box(std::apply(kFunction, groups), stack);
    }
  }
};

template <auto kFunction>
Operator define(const char* name) {
  Boxed<kFunction>::name = name;
  return {name, Boxed<kFunction>::schema(name), Boxed<kFunction>::call};
}

// This is what becomes of calls on CPU tensors. Where they are meant for the CUDA kernels, but the capability table has
// no row of CUDA for the system, the CPU's kernels serve them or not.
enum class OnHost { kRefused, kServed };

// It registers operators for as long as it lives: on the CPU, and on CUDA where the capability table has a row of it
// for `system`. Elsewhere the table's refusal answers, from Python.
class Registration {
 public:
  Registration(const char* system, OnHost on_host, std::initializer_list<Operator> operators);

 private:
  torch::stable::detail::StableLibrary schemas_, cpu_;
  std::optional<torch::stable::detail::StableLibrary> cuda_;
};

}  // namespace attnx::ops

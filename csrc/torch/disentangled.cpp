// This file registers torch.ops.attnx.disentangled_attention and its backward: softmax attention whose logits have
// numbers by distance from rows of the queries and of the keys.
#include "results.h"
#include "terms.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "disentangled_attention";

struct Tables {
  std::optional<StableTensor> query_table, key_table;
  StableTensor table_index;
  ATTNX_FIELDS(query_table, key_table, table_index)
};
struct WantedTables {
  bool query_table_gradient, key_table_gradient;
  ATTNX_FIELDS(query_table_gradient, key_table_gradient)
};
// They are empty where they are not wanted, and else like the tables.
struct TableGradients {
  StableTensor grad_query_table, grad_key_table;
  ATTNX_FIELDS(grad_query_table, grad_key_table)
};

// It returns how many numbers a row of the table has.
std::int64_t read_table(std::string_view name, const StableTensor& x, std::int64_t length, const StableTensor& query,
                        const AttentionParams& p, Tensor& place) {
  check_dtype(name, x, sum_type(query), " (the type of the sums)");
  check(x.dim() == 4 && x.size(0) == p.batch && x.size(1) == p.heads_q && x.size(2) == length, name,
        ": expected shape (", p.batch, ", ", p.heads_q, ", ", length, ", numbers), sequences, query heads, ",
        name == "key_table" ? "keys" : "queries", " and numbers by distance, got ", shape_of(x));
  check_layout(name, x);
  place = view_rows(x);
  return x.size(3);
}

void check_index(const StableTensor& index, std::int64_t numbers) {
  const auto values = values_on_host(index);
  if (!values) return;
  for (std::int64_t i = 0; i < index.numel(); ++i) {
    const std::int32_t number = data<const std::int32_t>(*values)[i];
    check(number >= 0 && number < numbers, "table_index: expected numbers from 0 to below ", numbers,
          ", the size of a table's row, got ", number, " at ", i);
  }
}

void read(const Target& target, const Inputs& x, const Tables& tables, const Terms& terms, const Window& window,
          AttentionParams& p) {
  p.score = Score::kSoftmax;
  read_inputs(target, x, Dense(), p);
  read_window(window, p);
  read_terms(target, terms, p);
  check(tables.query_table || tables.key_table, "query_table: expected a tensor where key_table is None, got None");
  std::int64_t of_query = 0, of_key = 0;
  if (tables.query_table)
    of_query = read_table("query_table", *tables.query_table, p.length_q, x.query, p, p.terms.tables.query);
  if (tables.key_table) of_key = read_table("key_table", *tables.key_table, p.length_k, x.query, p, p.terms.tables.key);
  check(!tables.query_table || !tables.key_table || of_query == of_key, "key_table: expected rows of ", of_query,
        " numbers like query_table, got ", of_key);
  check_dtype("table_index", tables.table_index, ScalarType::Int, "");
  check_shape("table_index", tables.table_index, {std::max<std::int64_t>(p.length_q + p.length_k - 1, 0)});
  check_contiguous("table_index", tables.table_index);
  check_index(tables.table_index, std::max(of_query, of_key));
  p.terms.tables.index = data<const std::int32_t>(tables.table_index);
  p.terms.tables.numbers = std::max(of_query, of_key);
}

Outputs forward(const Inputs& x, const Tables& tables, const Terms& terms, const Window& window) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  read(target, x, tables, terms, window, p);
  return run_forward(target, x, p);
}

StableTensor empty_gradient(const StableTensor& query, bool wanted, const std::optional<StableTensor>& table,
                            Tensor& place) {
  if (!wanted || !table) return make_empty(query, std::vector<std::int64_t>{0}, sum_type(query));
  const auto sizes = table->sizes();
  StableTensor gradient = make_zeros(query, std::vector<std::int64_t>(sizes.begin(), sizes.end()), sum_type(query));
  place = view_rows(gradient);
  return gradient;
}

using AllGradients = std::tuple<InputGradients, HeadGradients<Dense>, TableGradients, TermGradients>;

AllGradients backward(const OutputGradients& gradients, const Inputs& x, const Outputs& y, const Tables& tables,
                      const Terms& terms, const Window& window, const WantedTables& wanted_tables,
                      const WantedTerms& wanted, const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  read(target, x, tables, terms, window, p);
  read_outputs(gradients, y, x, p);
  const TableGradients of_tables{
      empty_gradient(x.query, wanted_tables.query_table_gradient, tables.query_table, p.grad_query_table),
      empty_gradient(x.query, wanted_tables.key_table_gradient, tables.key_table, p.grad_key_table)};
  const auto of_terms = std::tuple(of_tables, empty_gradients(target, wanted, terms, p));
  return std::tuple_cat(run_backward(target, x, Dense(), p), of_terms);
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward>("disentangled_attention"),
                                 define<backward>("disentangled_attention_backward")});

}  // namespace

}  // namespace attnx::ops

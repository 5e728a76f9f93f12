// This is the forward alone: nothing has a tangent. What the loop asks of tangents beyond that costs nothing here.
#pragma once

#include "../arena.h"
#include "../epilogue/output.h"

namespace attnx::cpu::ATTNX_ISA {

template <class A, class Score>
struct NoTangents {
  using Sum = typename A::Sum;
  using Rows = OutputRows<Sum>;

  NoTangents(const ForwardParams&, std::int64_t /*panels*/, std::int64_t /*keys*/, Arena&) {}

  // It returns how many numbers a row's sums are.
  static std::int64_t numbers(std::int64_t value_dim) { return value_dim; }

  template <class RowsOf>
  void begin(int /*panel*/, const Panel<Sum>&, const RowsOf&, typename A::Element* /*rows*/) {}
  template <class Storage>
  void load_tile(const Storage&, const KeyTile&) {}
  template <class Multiply>
  void multiply(int /*panel*/, const Panel<Sum>&, const KeyTile&, const Multiply&) {}
  template <class OnTile, class Weigh>
  void weigh(int /*panel*/, const OnTile& on_tile, const Weigh& weigh) const {
    weigh(on_tile);
  }
  template <class Add>
  void add(const Panel<Sum>&, std::int64_t /*keys*/, Sum* /*sums*/, const Add&) {}
  template <class Row>
  void finish(int /*panel*/, int /*lane*/, const Sum* /*sums*/, Sum /*factor*/, const Row&) const {}
};

}  // namespace attnx::cpu::ATTNX_ISA

// attnx._C: importing it loads libattnx, which registers torch.ops.attnx.*; it also tells what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "attnx/capability.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::size_t start = 0;
  for (std::size_t end; (end = text.find(',', start)) != text.npos; start = end + 1)
    parts.push_back(text.substr(start, end - start));
  parts.push_back(text.substr(start));
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ATTNX_VERSION;
  info["compiler"] = ATTNX_COMPILER;
  info["cpu_instruction_sets"] = split(ATTNX_ISAS);
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
  info["torch_target"] = ATTNX_TORCH_TARGET;
  return info;
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
}

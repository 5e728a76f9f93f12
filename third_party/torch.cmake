# torch_stable: torch's headers and the two libraries a stable-ABI library links, found by asking Python.
#
# find_package(Torch) is avoided on purpose: it wants the CUDA toolkit that torch was built with, and rewrites
# CMAKE_CUDA_ARCHITECTURES. Nothing beyond torch/csrc/stable and torch/headeronly is used, so neither matters here.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE torch_dir
  OUTPUT_STRIP_TRAILING_WHITESPACE
  COMMAND_ERROR_IS_FATAL ANY)

set(ATTNX_TORCH_TARGET 2.10)  # the oldest torch that the binary loads in
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_dir}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(torch_stable INTERFACE ${torch_dir}/lib/libtorch_cpu.so ${torch_dir}/lib/libc10.so)

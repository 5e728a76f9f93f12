# cutlass: CUTLASS's headers, of the Python package nvidia-cutlass, found by asking Python. For plain products of
# matrices; no unit but those that compute one includes them.
set(ATTNX_CUTLASS_INCLUDE_DIR "" CACHE PATH "Folder with cutlass/cutlass.h; by default that of the package nvidia-cutlass")

set(cutlass_include ${ATTNX_CUTLASS_INCLUDE_DIR})
if(NOT cutlass_include)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE cutlass_include
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  string(APPEND cutlass_include /source/include)
endif()
if(NOT EXISTS ${cutlass_include}/cutlass/cutlass.h)
  message(FATAL_ERROR "CUTLASS: ${cutlass_include}/cutlass/cutlass.h not found, which the CUDA kernels need. "
                      "Run pip install nvidia-cutlass, set ATTNX_CUTLASS_INCLUDE_DIR, or build with ATTNX_CUDA=OFF.")
endif()

add_library(cutlass INTERFACE)
target_include_directories(cutlass SYSTEM INTERFACE ${cutlass_include})

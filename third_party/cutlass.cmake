# cutlass: the CUTLASS and CuTe headers, from CUTLASS_DIR or from the nvidia-cutlass wheel of the build environment.
set(CUTLASS_DIR "" CACHE PATH "A CUTLASS tree (with include/cutlass), instead of the nvidia-cutlass wheel")
if(CUTLASS_DIR)
  set(cutlass_include ${CUTLASS_DIR}/include)
else()
  # The wheel's package is found without importing it: its import needs the CUDA driver's Python bindings.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE cutlass_library
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
  set(cutlass_include ${cutlass_library}/source/include)
endif()
if(NOT EXISTS ${cutlass_include}/cute/tensor.hpp)
  message(FATAL_ERROR "CUTLASS: no cute/tensor.hpp in '${cutlass_include}'. "
                      "Install the build requirement nvidia-cutlass, or set CUTLASS_DIR.")
endif()
add_library(cutlass INTERFACE)
target_include_directories(cutlass SYSTEM INTERFACE ${cutlass_include})

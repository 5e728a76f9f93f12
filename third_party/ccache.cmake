# ccache, where it is found: it compiles again only what changed, also when a build folder is new.
set(ATTNX_CCACHE AUTO CACHE STRING "Compile by way of ccache: AUTO (where it is found, not for a wheel), ON or OFF")
set_property(CACHE ATTNX_CCACHE PROPERTY STRINGS AUTO ON OFF)

# A wheel is built beside a torch in a folder of random name, which no later build asks for again.
if(ATTNX_CCACHE STREQUAL "OFF" OR (ATTNX_CCACHE STREQUAL "AUTO" AND SKBUILD_STATE STREQUAL "wheel"))
  return()
endif()
find_program(ATTNX_CCACHE_PROGRAM ccache)
mark_as_advanced(ATTNX_CCACHE_PROGRAM)
if(ATTNX_CCACHE_PROGRAM)
  foreach(language CXX CUDA)
    if(NOT CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER ${ATTNX_CCACHE_PROGRAM})
    endif()
  endforeach()
elseif(ATTNX_CCACHE STREQUAL "ON")
  message(FATAL_ERROR "ATTNX_CCACHE=ON: ccache not found. Put it on PATH.")
endif()

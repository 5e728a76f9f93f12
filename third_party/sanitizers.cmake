# ATTNX_SANITIZE has sanitizers check host code while it runs; `.ci/run sanitizers` and `.ci/run threads` build with
# them and run tests.
set(ATTNX_KERNEL_OPTIMISATION -O3)
if(ATTNX_SANITIZE)
  set(ATTNX_KERNEL_OPTIMISATION -O1)  # kernels take many times as long to compile with checks at -O3
  if(ATTNX_SANITIZE STREQUAL "address")
    set(checks -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  else()
    set(checks -fsanitize=thread)
  endif()
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${checks};-fno-omit-frame-pointer;-g1>")
  add_link_options(${checks})
endif()

# ATTNX_SANITIZE has AddressSanitizer and UBSan check host code while it runs; `.ci/run sanitizers` builds and runs it.
set(ATTNX_KERNEL_OPTIMISATION -O3)
if(ATTNX_SANITIZE)
  set(ATTNX_KERNEL_OPTIMISATION -O1)  # kernels take many times as long to compile with checks at -O3
  set(checks -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${checks};-fno-omit-frame-pointer;-g1>")
  add_link_options(${checks})
endif()

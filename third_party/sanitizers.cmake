# ATTNX_SANITIZE: what is checked while tests run, which .ci/sanitize builds and runs. Host code alone is checked.
set(ATTNX_SANITIZE "" CACHE STRING "Check with address (AddressSanitizer and UBSan) or thread (ThreadSanitizer)")
set_property(CACHE ATTNX_SANITIZE PROPERTY STRINGS "" address thread)

set(ATTNX_KERNEL_OPTIMISATION -O3)
if(ATTNX_SANITIZE)
  if(ATTNX_SANITIZE STREQUAL "address")
    set(checks -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  elseif(ATTNX_SANITIZE STREQUAL "thread")
    set(checks -fsanitize=thread)
  else()
    message(FATAL_ERROR "ATTNX_SANITIZE: expected address, thread or nothing, got ${ATTNX_SANITIZE}")
  endif()
  # Kernels take many times as long to compile with checks at -O3.
  set(ATTNX_KERNEL_OPTIMISATION -O1)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> -g1 "$<$<COMPILE_LANGUAGE:CXX>:${checks}>")
  add_link_options(${checks})
endif()

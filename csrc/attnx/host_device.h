// This marks functions that host and device share.
#pragma once

#if defined(__CUDACC__)
#define ATTNX_HOST_DEVICE __host__ __device__
#else
#define ATTNX_HOST_DEVICE
#endif

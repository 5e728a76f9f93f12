// This marks what libattnx shows to the Python module.
#pragma once

#define ATTNX_API __attribute__((visibility("default")))

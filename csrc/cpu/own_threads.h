// An executor starts a thread for each worker and waits for all. ThreadSanitizer sees that these start and end, where
// it does not see what torch's threads wait for: they are those of OpenMP, whose library is not built with its checks.
#pragma once

#include <exception>
#include <thread>
#include <vector>

#include "executor.h"

namespace attnx::cpu {

// What one of the tasks throws is thrown again when all have ended.
inline Executor on_own_threads(int threads) {
  return {threads, [](const Executor& self, void (*task)(void*, int), void* context) {
            std::vector<std::exception_ptr> errors(std::size_t(self.threads));
            std::vector<std::thread> workers;
            for (int worker = 0; worker < self.threads; ++worker)
              workers.emplace_back([&, worker] {
                try {
                  task(context, worker);
                } catch (...) {
                  errors[std::size_t(worker)] = std::current_exception();
                }
              });
            for (std::thread& worker : workers) worker.join();
            for (const std::exception_ptr& error : errors)
              if (error) std::rethrow_exception(error);
          }};
}

}  // namespace attnx::cpu

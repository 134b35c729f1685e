// How a kernel shares its work: tasks 0..count-1 in any order, on any threads, each once.
#pragma once
#include <cstddef>

namespace anybit::cpu {

struct Parallel {
  using Task = void (*)(void* data, size_t index);
  // Runs task(data, i) for every i below count, and returns when all are done.
  void (*run)(void* context, Task task, void* data, size_t count);
  void* context;
  int threads = 1;  // most that may run tasks at a time, as far as is known

  template <class F>
  void operator()(size_t count, const F& body) const {
    if (count == 1) return body(size_t{0});
    const Task task = [](void* data, size_t index) { (*static_cast<const F*>(data))(index); };
    run(context, task, const_cast<F*>(&body), count);
  }
};

// On the calling thread.
inline void run_serially(void*, Parallel::Task task, void* data, size_t count) {
  for (size_t i = 0; i < count; ++i) task(data, i);
}

}  // namespace anybit::cpu

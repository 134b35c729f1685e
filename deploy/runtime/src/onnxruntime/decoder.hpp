// The backend that runs the ONNX file on the CPU.
#pragma once
#include <memory>

#include "backend.hpp"
#include "cache_form.hpp"
#include "onnxruntime/session.hpp"

namespace anybit::ort {

// slots: sequences that it keeps caches of. The static form's are allocated here, and take memory as
// they fill.
//
// Throws Error: there is no address space for it.
std::unique_ptr<Backend> make_backend(std::unique_ptr<Session> session, const CacheForm& form,
                                      int slots, int vocab);

}  // namespace anybit::ort

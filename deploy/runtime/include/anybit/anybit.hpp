// The whole C++ interface: loads an artifact of python -m exporter and streams text from it.
#pragma once
#include "anybit/chat.hpp"
#include "anybit/engine.hpp"
#include "anybit/error.hpp"
#include "anybit/model.hpp"
#include "anybit/request.hpp"
#include "anybit/sampling.hpp"
#include "anybit/tokenizer.hpp"

namespace anybit {

inline constexpr char kVersion[] = "0.1.0";  // of this header

}  // namespace anybit

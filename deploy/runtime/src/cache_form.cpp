// Compares a decoder's inputs and outputs with what docs/onnx.md says of them.
#include "cache_form.hpp"

#include "anybit/error.hpp"

namespace anybit {
namespace {

const std::string kPast = "past_key_values.", kPresent = "present.";

std::vector<CacheTensor> cache_tensors(const Tensors& inputs) {
  std::vector<CacheTensor> found;
  for (const auto& [name, input] : inputs) {
    if (name.compare(0, kPast.size(), kPast) == 0) {
      found.push_back({name, kPresent + name.substr(kPast.size()), input.type, input.dims});
    }
  }
  return found;
}

}  // namespace

size_t bytes_of(ort::ElementType type) {
  switch (type) {
    case ort::kUint8:
    case ort::kInt8: return 1;
    case ort::kHalf:
    case ort::kBFloat16: return 2;
    case ort::kFloat:
    case ort::kInt32: return 4;
    case ort::kInt64: return 8;
    default: return 0;
  }
}

size_t CacheTensor::bytes(int64_t tokens) const {
  size_t count = bytes_of(type);
  for (size_t i = 1; i < dims.size(); ++i) {
    count *= static_cast<size_t>(i == kTokens ? tokens : dims[i]);
  }
  return count;
}

std::vector<int64_t> CacheTensor::shape(int64_t rows, int64_t tokens) const {
  std::vector<int64_t> shape = dims;
  shape[0] = rows;
  shape[kTokens] = tokens;
  return shape;
}

CacheForm cache_form(const Tensors& has_inputs, const Tensors& has_outputs,
                     const Description& description, const std::string& where,
                     const std::string& fix) {
  const auto refuse = [&](const std::string& got, const std::string& expected) {
    return Error(where, "got " + got + ", expected " + expected, fix);
  };
  CacheForm form;
  form.is_static = has_inputs.count("write_indices") > 0;
  form.picks_logits = has_inputs.count("logits_indices") > 0;
  form.capacity = description.cache.capacity;
  if (form.is_static != (description.cache.form == "static")) {
    throw refuse(form.is_static ? "a static cache" : "a cache without write_indices",
                 "the " + description.cache.form + " form of model.json");
  }
  std::map<std::string, ort::ElementType> inputs{{"input_ids", ort::kInt64}},
      outputs{{"logits", ort::kFloat}};
  if (form.picks_logits) inputs["logits_indices"] = ort::kInt64;
  for (const char* name : {"attention_mask", "position_ids"}) {
    if (!form.is_static) inputs[name] = ort::kInt64;
  }
  if (form.is_static) inputs["write_indices"] = ort::kInt64;
  form.tensors = cache_tensors(has_inputs);
  if (form.tensors.empty()) throw refuse("no input " + kPast + "0.key", "a decoder's");
  for (const CacheTensor& tensor : form.tensors) {
    bool known = tensor.dims.size() > CacheTensor::kTokens;
    for (size_t i = 1; i < tensor.dims.size(); ++i) {
      known = known && (i == CacheTensor::kTokens || tensor.dims[i] > 0);
    }
    if (!known) throw refuse("an input " + tensor.past + " of unknown size", "[B, H, tokens, D]");
    if (bytes_of(tensor.type) == 0) {
      throw refuse(
          "an input " + tensor.past + " of type " + std::to_string(tensor.type) + " of ONNX",
          "floats of 16 or 32 bits, or bytes");
    }
    form.token_bytes += tensor.bytes(1);
    inputs[tensor.past] = outputs[tensor.present] = tensor.type;
  }
  const auto compare = [&](const Tensors& has, const char* what,
                           const std::map<std::string, ort::ElementType>& wanted) {
    for (const auto& [name, type] : wanted) {
      const auto found = has.find(name);
      if (found == has.end()) throw refuse(std::string("no ") + what + name, "a decoder's");
      if (found->second.type != type) {
        throw refuse(what + name + " of type " + std::to_string(found->second.type),
                     "type " + std::to_string(type) + " of ONNX");
      }
    }
    for (const auto& [name, type] : has) {
      if (wanted.count(name) == 0) throw refuse(what + printable(name), "a decoder's");
    }
  };
  compare(has_inputs, "input ", inputs);
  compare(has_outputs, "output ", outputs);
  // Backends make room for as many as the description says.
  const std::vector<int64_t>& logits = has_outputs.at("logits").dims;
  if (logits.size() != 3 || (logits[2] > 0 && logits[2] != description.vocab)) {
    throw refuse("logits of " + (logits.empty() ? "no" : std::to_string(logits.back())) +
                     " numbers for a token",
                 std::to_string(description.vocab) + " as in model.json");
  }
  return form;
}

}  // namespace anybit

// Which GPUs the code of a build runs on. No torch and no CUDA headers, so that it is tested on any machine.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace flash_attn {

constexpr int kOldestComputeCapability = 80;  // cp.async, bf16 and m16n8k16

// Splits the list of targets that setup.py passes, such as "sm_80 sm_90a compute_80".
inline std::vector<std::string> split_targets(std::string_view text) {
    std::vector<std::string> targets;
    while (!text.empty()) {
        const size_t end = text.find(' ');
        if (end != 0) targets.emplace_back(text.substr(0, end));
        text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    }
    return targets;
}

// sm_XY runs on devices of the same major version and at least that minor version, sm_XYa on exactly that device. The
// driver compiles compute_XY (PTX) for every device of at least that version.
inline bool runs_on(std::string_view target, int compute_capability) {
    const bool is_intermediate = target.starts_with("compute_"), is_specific = target.ends_with('a');
    int version = 0;
    for (const char c : target) {
        if (c >= '0' && c <= '9') version = 10 * version + (c - '0');
    }
    if (is_specific) return compute_capability == version;
    return compute_capability >= version && (is_intermediate || compute_capability / 10 == version / 10);
}

inline std::string version_text(int compute_capability) {
    return std::to_string(compute_capability / 10) + '.' + std::to_string(compute_capability % 10);
}

// Why a device cannot run this build's kernels, with the remedy; empty if it can.
inline std::string unavailable_reason(const std::string& device, int compute_capability, std::string_view targets) {
    const std::string is = device + " has compute capability " + version_text(compute_capability);
    if (compute_capability < kOldestComputeCapability) {
        return is + ", and the CUDA kernels need " + version_text(kOldestComputeCapability) +
               " or newer; move the tensors to the CPU";
    }
    for (const std::string& target : split_targets(targets)) {
        if (runs_on(target, compute_capability)) return "";
    }
    return is + ", and this build has code for " + std::string(targets) +
           " only; rebuild it with FLASH_ATTN_CUDA_ARCHS=" + version_text(compute_capability) +
           " pip install --no-build-isolation .";
}

}  // namespace flash_attn

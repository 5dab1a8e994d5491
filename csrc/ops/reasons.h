// Collects everything that is wrong with a call, to raise it as one error.
#pragma once
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <string>
#include <vector>
#include "ops/arguments.h"

namespace flash_attn {

class Reasons {
public:
    Reasons(Pass pass, bool packed) : pass_(pass), packed_(packed) {}
    explicit Reasons(const ProblemArgs& args) : Reasons(args.pass, args.packed()) {}

    template <class Argument, class Expected, class Got>
    void add(const Argument& argument, const Expected& expected, const Got& got) {
        reasons_.push_back(c10::str(argument, ": expected ", expected, ", got ", got));
    }
    bool empty() const { return reasons_.empty(); }
    // Raises a Python ValueError if there is any reason.
    void raise_if_any() const {
        if (!empty()) raise();
    }

private:
    [[noreturn]] void raise() const {
        std::string text = caller();
        if (reasons_.size() == 1) {
            text += reasons_[0];
        } else {
            text += c10::str(reasons_.size(), " problems:");
            for (const std::string& reason : reasons_) text += "\n  - " + reason;
        }
        C10_THROW_ERROR(ValueError, text);
    }
    const char* caller() const {
        switch (pass_) {
            case Pass::kForward:
                return packed_ ? "flash_attn_varlen_func: " : "flash_attn_func: ";
            case Pass::kBackward:
                return packed_ ? "flash_attn varlen backward: " : "flash_attn backward: ";
            case Pass::kCache:
                return "flash_attn_with_kvcache: ";
            default:
                return packed_ ? "flash_attn varlen attn_probs: " : "flash_attn attn_probs: ";
        }
    }

    Pass pass_;
    bool packed_;
    std::vector<std::string> reasons_;
};

}  // namespace flash_attn

// The extension module. Importing it registers the ops; the module itself has only the fast paths of eager_call.h and
// a description of the build.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>
#include "cpu/backend.h"
#include "ops/asked_backend.h"
#include "ops/cuda_targets.h"
#include "ops/eager_call.h"
#include "ops/prepare.h"

namespace flash_attn {

pybind11::list as_list(const std::vector<std::string>& texts) {
    pybind11::list list;
    for (const std::string& text : texts) list.append(text);
    return list;
}

// The backends, best first, each with the targets that it was built for (empty: not in this build).
pybind11::list backends() {
    pybind11::list list;
    const auto add = [&](const char* name, const std::vector<std::string>& built_for) {
        pybind11::dict backend;
        backend["name"] = name;
        backend["built_for"] = as_list(built_for);
        list.append(backend);
    };
    for (const cuda::BackendInfo& each : cuda::backends()) add(each.name, split_targets(each.code));
    add(kCpuBackend, {cpu::instruction_set()});
    return list;
}

bool has_hopper_kernels() {
    for (const cuda::BackendInfo& each : cuda::backends())
        if (each.name == std::string_view("sm90") && *each.code) return true;
    return false;
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["torch_version"] = TORCH_VERSION;
    info["built_because"] = FLASH_ATTN_BUILT_BECAUSE;
#ifdef FLASH_ATTN_CUDA_VERSION
    info["cuda_version"] = FLASH_ATTN_CUDA_VERSION;
    info["cuda_archs"] = as_list(split_targets(FLASH_ATTN_CUDA_TARGETS));
#else
    info["cuda_version"] = pybind11::none();
    info["cuda_archs"] = pybind11::list();
#endif
    info["cpu_instruction_set"] = cpu::instruction_set();
    info["backends"] = backends();
    info["hopper_kernels"] = has_hopper_kernels();
    info["max_head_dim"] = kMaxHeadDim;
    return info;
}

// METH_FASTCALL costs a tenth of pybind11's argument handling.
PyMethodDef fast_call(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
            "The public functions where every argument is plain; None where one is not."};
}

PyMethodDef functions[] = {
    fast_call("attention", eager_call),
    fast_call("attention_with_kvcache", eager_kvcache_call),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace flash_attn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Registers the ops of torch.ops.flash_attn, and calls them.";
    if (PyModule_AddFunctions(m.ptr(), flash_attn::functions) < 0) throw pybind11::error_already_set();
    m.def("build_info", &flash_attn::build_info, "What this build was made for.");
}

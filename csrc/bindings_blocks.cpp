// Lends blocks to tensors as DLPack capsules; dpmmd/_cores/blocks.py alone makes tensors of them.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bindings.h"
#include "cpu/blocks.h"

namespace py = pybind11;

namespace {

// From dlpack.h, version 0.8, the layout of capsules named "dltensor".
namespace dlpack {

struct Device {
    std::int32_t type, id;
};
struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType type;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};
struct Managed {
    Tensor tensor;
    void* manager;
    void (*deleter)(Managed*);
};
constexpr std::int32_t cpu = 1;
constexpr DataType f32{2, 32, 1}, bf16{4, 16, 1};

}  // namespace dlpack

// A borrowed block and what a capsule says of it. Whoever takes the capsule deletes it, on whatever
// thread and without the GIL.
struct Loan {
    dlpack::Managed managed{};
    std::vector<std::int64_t> sizes;  // shape, then strides
    dpmmd::blocks::Block block{};

    Loan() = default;
    Loan(const Loan&) = delete;
    ~Loan() {
        if (block.data) dpmmd::blocks::give_back(block);
    }
};

constexpr const char* untaken = "dltensor";  // whoever takes a capsule renames it

void delete_untaken(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, untaken)) return;
    auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, untaken));
    managed->deleter(managed);
}

// An uninitialised tensor of this shape, with these strides, type f32 or bf16, as a capsule; None
// where no block is to be had.
py::object lend(
    const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides, int type
) {
    const bool single = static_cast<dpmmd::Type>(type) == dpmmd::Type::f32;
    std::size_t last = 0;  // element
    for (std::size_t i = 0; i < shape.size(); ++i) {
        last += static_cast<std::size_t>((shape[i] - 1) * strides[i]);
    }
    auto loan = std::make_unique<Loan>();
    loan->sizes = shape;
    loan->sizes.insert(loan->sizes.end(), strides.begin(), strides.end());
    loan->block = dpmmd::blocks::borrow((last + 1) * (single ? 4 : 2));
    if (!loan->block.data) return py::none();
    dlpack::Tensor& tensor = loan->managed.tensor;
    tensor.data = loan->block.data;
    tensor.device = {dlpack::cpu, 0};
    tensor.ndim = static_cast<std::int32_t>(shape.size());
    tensor.type = single ? dlpack::f32 : dlpack::bf16;
    tensor.shape = loan->sizes.data();
    tensor.strides = loan->sizes.data() + shape.size();
    loan->managed.manager = loan.get();
    loan->managed.deleter = [](dlpack::Managed* managed) {
        delete static_cast<Loan*>(managed->manager);
    };
    PyObject* capsule = PyCapsule_New(&loan->managed, untaken, delete_untaken);
    if (!capsule) throw py::error_already_set();
    loan.release();
    return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_blocks(py::module_& module) {
    module.def("lend", lend);
    module.def("begin_pass", dpmmd::blocks::begin_pass);
    module.def("return_blocks", dpmmd::blocks::return_idle);
    module.def("keep_blocks", dpmmd::blocks::keep);
}

// The Python module peft_kernels._C. Pointers and streams arrive as integers (`tensor.data_ptr()`,
// `stream.cuda_stream`), so the module knows nothing of torch and one build serves every version of it. The Python side
// checks arguments and sets the device.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "batched_lowrank_linear.h"
#include "gated_query.h"
#include "lowrank_linear.h"
#include "lowrank_projections.h"
#include "reconstruct.h"
#include "weight_distance.h"

namespace py = pybind11;

namespace {

// A field of a params struct as a Python attribute: pointers and enums as integers, the rest as it is.
template <typename Struct, typename Field>
void bind_field(py::class_<Struct>& cls, const char* name, Field Struct::* field) {
    if constexpr (std::is_pointer_v<Field>)
        cls.def_property(
            name, [field](const Struct& p) { return reinterpret_cast<uintptr_t>(p.*field); },
            [field](Struct& p, uintptr_t value) { p.*field = reinterpret_cast<Field>(value); });
    else if constexpr (std::is_enum_v<Field>)
        cls.def_property(
            name, [field](const Struct& p) { return static_cast<int>(p.*field); },
            [field](Struct& p, int value) { p.*field = static_cast<Field>(value); });
    else cls.def_readwrite(name, field);
}

py::dict build_info() {
    py::list architectures, kernels;
    std::istringstream words(PEFT_KERNELS_BUILT_ARCHS);
    for (std::string word; words >> word;) architectures.append(word);
    for (const char* kernel :
         {"lowrank_linear", "lowrank_projections", "batched_lowrank_linear", "reconstruct", "weight_distance",
          "gated_query"})
        kernels.append(kernel);
    py::dict info;
    info["architectures"] = architectures;
    info["cuda_version"] = PEFT_KERNELS_CUDA_VERSION;
    info["kernels"] = kernels;
    info["emulated"] = bool(PEFT_KERNELS_EMULATED);
    return info;
}

// ---- what tensors look like: DLPack's exchange interface, by which torch's tensors show it without torch's headers ----

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    uint32_t dtype;  // code, bits and lanes
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLPackExchange {  // of DLPack 1.3, which keeps it within its version 1
    uint32_t major, minor;
    void *older, *allocate, *from_object, *to_object;
    int (*look)(void* object, DLTensor* out);
    void* stream;
};

// Sizes, strides, dtype and device of each tensor, with its address, or how far that is from a multiple of 16 bytes.
py::bytes looks(const py::list& tensors, const py::capsule& exchange, bool addresses) {
    const auto* dlpack = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!dlpack) throw py::error_already_set();
    if (dlpack->major != 1 || !dlpack->look) throw std::runtime_error("looks: another version of DLPack");
    std::vector<int64_t> found;
    found.reserve(8 * tensors.size());
    for (py::handle tensor : tensors) {
        DLTensor t;
        if (dlpack->look(tensor.ptr(), &t)) throw py::error_already_set();
        const auto address = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
        found.insert(found.end(), {addresses ? address : address % 16, t.dimensions, t.dtype, t.device_type, t.device_id});
        found.insert(found.end(), t.shape, t.shape + t.dimensions);
        found.insert(found.end(), t.strides, t.strides + t.dimensions);
    }
    return {reinterpret_cast<const char*>(found.data()), sizeof(int64_t) * found.size()};
}

// ---- params structs --------------------------------------------------------------------------------------------------

using Stream = uintptr_t;
using Address = uintptr_t;  // 0: there is no such tensor

#define FIELD(name) bind_field(params, #name, &Params::name)
#define SET(name) p.name = reinterpret_cast<decltype(p.name)>(name)

void bind_lowrank_linear(py::module_& m) {
    using Params = LowRankKind;
    py::class_<Params> params(m, "LowRankKind", py::module_local());
    params.def(py::init<>());
    FIELD(in_features), FIELD(out_features), FIELD(rank), FIELD(in_blocks), FIELD(out_blocks);
    FIELD(dtype), FIELD(down_float), FIELD(up_float), FIELD(core_float), FIELD(core_kind);
    FIELD(dropout_p), FIELD(drop_input), FIELD(drop_rank), FIELD(drop_core);
    FIELD(needs_x), FIELD(needs_down), FIELD(needs_up), FIELD(needs_core), FIELD(needs_z), FIELD(processors);
    m.attr("LOWRANK_LINEAR_MAX_RANK") = kLowRankLinearMaxRank;
    m.attr("LOWRANK_LINEAR_MAX_HIDDEN") = kLowRankLinearMaxHidden;
    m.def("lowrank_linear_fwd", [](const Params& kind, Stream stream, int64_t rows, float scale, int64_t x_stride,
                                   int64_t z_stride, Address x, Address bias, Address down, Address up, Address core,
                                   Address z, Address mixed, Address y, Address rng, Address scale_ptr) {
        LowRankLinear p{kind};
        p.rows = rows, p.scale = scale, p.x_stride = x_stride, p.z_stride = z_stride;
        SET(x), SET(bias), SET(down), SET(up), SET(core), SET(z), SET(mixed), SET(y), SET(rng), SET(scale_ptr);
        lowrank_linear_fwd(p, reinterpret_cast<void*>(stream));
    });
    m.def("lowrank_linear_bwd_floats", lowrank_linear_bwd_floats);
    m.def("lowrank_linear_bwd", [](const Params& kind, Stream stream, int64_t rows, float scale, int64_t dy_stride,
                                   int64_t x_stride, int64_t z_stride, int64_t dz_stride, Address dy, Address x,
                                   Address down, Address up, Address core, Address z, Address dx, Address d_down,
                                   Address d_up, Address d_core, Address dz, Address rng, Address scale_ptr,
                                   Address workspace) {
        LowRankLinear p{kind};
        p.rows = rows, p.scale = scale;
        p.dy_stride = dy_stride, p.x_stride = x_stride, p.z_stride = z_stride, p.dz_stride = dz_stride;
        SET(dy), SET(x), SET(down), SET(up), SET(core), SET(z), SET(rng), SET(scale_ptr);
        SET(dx), SET(d_down), SET(d_up), SET(d_core), SET(dz);
        lowrank_linear_bwd(p, reinterpret_cast<float*>(workspace), reinterpret_cast<void*>(stream));
    });
    m.def("row_strips", [](int dtype, int64_t rank, int64_t rows, int64_t block_columns, int64_t blocks,
                           int64_t processors) {
        return row_strips(static_cast<DType>(dtype), rank, rows, block_columns, blocks, processors);
    });
    m.def("lowrank_linear_resident",
          [](int dtype, int64_t rank) { return lowrank_linear_resident(static_cast<DType>(dtype), rank); });
    m.def("lowrank_linear_shared_bytes", [](int dtype, int64_t rank) {
        const auto type = static_cast<DType>(dtype);
        return std::max(lowrank_linear_fwd_shared_bytes(type, rank), lowrank_linear_bwd_shared_bytes(type, rank));
    });
    m.def("philox_mask", [](uintptr_t rng, float p, int64_t rows, int64_t columns, uintptr_t keep, Stream stream) {
        philox_mask(reinterpret_cast<const int64_t*>(rng), p, rows, columns, reinterpret_cast<uint8_t*>(keep),
                    reinterpret_cast<void*>(stream));
    });
}

// The addresses and strides of a call's tensors, one after another.
struct Numbers {
    const py::list& list;
    size_t next = 0;
    template <typename P> void take(P*& pointer) { pointer = reinterpret_cast<P*>(list[next++].cast<Address>()); }
    void take(int64_t& stride) { stride = list[next++].cast<int64_t>(); }
};

void bind_lowrank_projections(py::module_& m) {
    using Params = ProjectionsKind;
    py::class_<Params> params(m, "ProjectionsKind", py::module_local());
    params.def(py::init<>());
    FIELD(count), FIELD(in_features), FIELD(rank), FIELD(dtype), FIELD(down_float), FIELD(up_float), FIELD(shared);
    FIELD(dropout_p), FIELD(drop_input), FIELD(drop_rank), FIELD(processors);
    FIELD(needs_x), FIELD(needs_down), FIELD(needs_up), FIELD(needs_z);
    params.def("set_out_features", [](Params& p, int64_t j, int64_t columns) { p.out_features[j] = columns; });
    m.attr("MOST_PROJECTIONS") = kMostProjections;
    m.def("lowrank_projections_fwd", [](const Params& kind, Stream stream, int64_t rows, const py::list& numbers) {
        LowRankProjections p{kind};
        Numbers given{numbers};
        p.rows = rows, given.take(p.x), given.take(p.z), given.take(p.rng);
        given.take(p.x_stride), given.take(p.z_stride);
        for (int64_t j = 0; j < kind.count; ++j) {
            auto& each = p.of[j];
            given.take(each.down), given.take(each.up), given.take(each.bias), given.take(each.scale);
            given.take(each.y), given.take(each.stride);
        }
        lowrank_projections_fwd(p, reinterpret_cast<void*>(stream));
    });
    m.def("lowrank_projections_bwd_floats", lowrank_projections_bwd_floats);
    m.def("lowrank_projections_bwd", [](const Params& kind, Stream stream, int64_t rows, const py::list& numbers,
                                        Address workspace) {
        LowRankProjections p{kind};
        Numbers given{numbers};
        p.rows = rows, given.take(p.x), given.take(p.z), given.take(p.rng);
        given.take(p.x_stride), given.take(p.z_stride);
        given.take(p.dx), given.take(p.d_down), given.take(p.d_up), given.take(p.dz);
        for (int64_t j = 0; j < kind.count; ++j) {
            auto& each = p.of[j];
            given.take(each.down), given.take(each.up), given.take(each.scale);
            given.take(each.dy), given.take(each.stride);
        }
        lowrank_projections_bwd(p, reinterpret_cast<float*>(workspace), reinterpret_cast<void*>(stream));
    });
    m.def("lowrank_projections_shared_bytes", [](int dtype, int64_t rank) {
        return lowrank_projections_shared_bytes(static_cast<DType>(dtype), rank);
    });
}

void bind_batched_lowrank_linear(py::module_& m) {
    using Params = BatchedLowRankLinear;
    py::class_<Params> params(m, "BatchedLowRankLinear", py::module_local());
    params.def(py::init<>());
    FIELD(rows), FIELD(in_features), FIELD(out_features), FIELD(rank), FIELD(adapters);
    FIELD(dtype), FIELD(down_float), FIELD(up_float), FIELD(scale), FIELD(scale_ptr);
    FIELD(order), FIELD(offsets), FIELD(tile_adapter), FIELD(tile_first), FIELD(tiles);
    FIELD(x), FIELD(x_stride), FIELD(bias), FIELD(down), FIELD(up), FIELD(z), FIELD(y);
    FIELD(dy), FIELD(dy_stride), FIELD(dz), FIELD(dx), FIELD(up_strips), FIELD(down_strips);
    FIELD(d_up_partial), FIELD(d_down_partial), FIELD(d_up), FIELD(d_down);
    m.attr("SEGMENT_ROWS") = kSegmentRows;
    m.def("batched_lowrank_linear_fwd",
          [](const Params& p, Stream stream) { batched_lowrank_linear_fwd(p, reinterpret_cast<void*>(stream)); });
    m.def("batched_lowrank_linear_bwd",
          [](const Params& p, Stream stream) { batched_lowrank_linear_bwd(p, reinterpret_cast<void*>(stream)); });
    m.def("batched_lowrank_linear_shared_bytes", [](int dtype, int64_t rank) {
        const auto type = static_cast<DType>(dtype);
        return std::max(batched_lowrank_linear_fwd_shared_bytes(type, rank),
                        batched_lowrank_linear_bwd_shared_bytes(type, rank));
    });
}

void bind_reconstruct(py::module_& m) {
    using Params = Reconstruct;
    py::class_<Params> params(m, "Reconstruct", py::module_local());
    params.def(py::init<>());
    FIELD(block_rows), FIELD(block_cols), FIELD(rank), FIELD(in_blocks), FIELD(out_blocks);
    FIELD(dtype), FIELD(down_float), FIELD(up_float), FIELD(core_float), FIELD(core_kind), FIELD(scale),
        FIELD(scale_ptr);
    FIELD(down), FIELD(up), FIELD(core), FIELD(base), FIELD(base_shared), FIELD(out);
    m.attr("RECONSTRUCT_ROWS") = kReconstructRows;
    m.attr("RECONSTRUCT_COLUMNS") = kReconstructColumns;
    m.def("reconstruct_fwd",
          [](const Params& p, Stream stream) { reconstruct_fwd(p, reinterpret_cast<void*>(stream)); });
    m.def("reconstruct_shared_bytes", [](int dtype) { return reconstruct_shared_bytes(static_cast<DType>(dtype)); });
}

void bind_weight_distance(py::module_& m) {
    {
        using Params = WeightDistance;
        py::class_<Params> params(m, "WeightDistance", py::module_local());
        params.def(py::init<>());
        FIELD(records), FIELD(tiles), FIELD(record_count), FIELD(tile_count), FIELD(follow), FIELD(decay);
        FIELD(reduction), FIELD(scale), FIELD(scale_ptr), FIELD(partial), FIELD(sums), FIELD(losses), FIELD(factors);
    }
    {
        using Params = Products;
        py::class_<Params> params(m, "Products", py::module_local());
        params.def(py::init<>());
        FIELD(records), FIELD(terms), FIELD(tiles), FIELD(tile_count);
    }
    m.attr("WEIGHT_DISTANCE_ROWS") = kWeightDistanceRows;
    m.attr("WEIGHT_DISTANCE_COLUMNS") = kWeightDistanceColumns;
    py::dict fields;  // int64 numbers in a row of each table
    fields["tile"] = sizeof(TileRow) / 8;
    fields["distance"] = sizeof(DistanceRow) / 8;
    fields["product"] = sizeof(ProductRow) / 8;
    fields["term"] = sizeof(TermRow) / 8;
    m.attr("WEIGHT_DISTANCE_FIELDS") = fields;
    m.def("weight_distance_fwd",
          [](const WeightDistance& p, Stream stream) { weight_distance_fwd(p, reinterpret_cast<void*>(stream)); });
    m.def("product_fwd", [](const Products& p, Stream stream) { product_fwd(p, reinterpret_cast<void*>(stream)); });
    m.def("weight_distance_shared_bytes", weight_distance_shared_bytes);
}

void bind_gated_query(py::module_& m) {
    using Params = GatedQuery;
    py::class_<Params> params(m, "GatedQuery", py::module_local());
    params.def(py::init<>());
    FIELD(rows), FIELD(columns), FIELD(positions), FIELD(dtype), FIELD(scale), FIELD(scale_ptr);
    FIELD(gamma_float), FIELD(beta_float), FIELD(cross_gamma_float), FIELD(cross_beta_float);
    FIELD(hidden), FIELD(hidden_stride), FIELD(text), FIELD(text_stride), FIELD(cross), FIELD(cross_stride);
    FIELD(gamma), FIELD(beta), FIELD(cross_gamma), FIELD(cross_beta), FIELD(padding_mask);
    FIELD(out), FIELD(gate), FIELD(total), FIELD(dy), FIELD(dy_stride), FIELD(q);
    FIELD(d_hidden), FIELD(d_text), FIELD(d_cross), FIELD(strips);
    FIELD(gamma_partial), FIELD(beta_partial), FIELD(cross_gamma_partial);
    FIELD(d_gamma), FIELD(d_beta), FIELD(d_cross_gamma), FIELD(d_cross_beta);
    m.attr("GATED_QUERY_ROWS") = kGatedQueryRows;
    m.attr("GATED_QUERY_COLUMNS") = kGatedQueryColumns;
    m.def("additive_query_fwd",
          [](const Params& p, Stream stream) { additive_query_fwd(p, reinterpret_cast<void*>(stream)); });
    m.def("additive_query_bwd",
          [](const Params& p, Stream stream) { additive_query_bwd(p, reinterpret_cast<void*>(stream)); });
    m.def("gated_query_fwd",
          [](const Params& p, Stream stream) { gated_query_fwd(p, reinterpret_cast<void*>(stream)); });
    m.def("gated_query_bwd",
          [](const Params& p, Stream stream) { gated_query_bwd(p, reinterpret_cast<void*>(stream)); });
}

#undef SET
#undef FIELD

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of peft_kernels; call them through peft_kernels.cuda_kernels.";
    m.def("build_info", build_info,
          "The architectures, CUDA version and operations that this module was compiled for.");
    m.def("looks", looks, "What tensors look like, as one value; peft_kernels/looks.py calls it.");
    bind_lowrank_linear(m);
    bind_lowrank_projections(m);
    bind_batched_lowrank_linear(m);
    bind_reconstruct(m);
    bind_weight_distance(m);
    bind_gated_query(m);
}

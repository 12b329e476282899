// A warp's products from shared memory: the tensor cores' for half precision, true float32 for float.
#pragma once
#include "common.cuh"

namespace peft {

// Of each 16 x 8 piece of a product, lane l of a warp holds four elements: rows l / 4 and l / 4 + 8, columns 2 (l % 4)
// and 2 (l % 4) + 1, row by row.
__device__ __forceinline__ int lane_row() { return int(threadIdx.x) % 32 / 4; }
__device__ __forceinline__ int lane_col() { return int(threadIdx.x) % 4 * 2; }

// f(value, row, column) for every element of a warp's product that this lane holds.
template <int N, typename F> __device__ __forceinline__ void for_each_element(const float (&c)[N][4], int n, F&& f) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (j >= n) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) f(c[j][i], lane_row() + i / 2 * 8, j * 8 + lane_col() + i % 2);
    }
}

// The tensor-core instruction mma.m16n8k16 and the loads that feed it (PTX ISA 9.7.14.5.8 and 9.7.14.5.15).
template <typename T> struct Mma {
    // Four 8 x 8 matrices, lanes 0-7 giving the row addresses of the first, and so on; each transposed, if asked for.
    template <bool TRANSPOSED> static __device__ __forceinline__ void load(uint32_t (&r)[4], const T* row) {
#ifdef __CUDACC__
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
        if constexpr (TRANSPOSED)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(address)
                         : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(address)
                         : "memory");
#else
        emulation::ldmatrix_x4(r, row, TRANSPOSED);
#endif
    }
    static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
        if constexpr (std::is_same_v<T, __half>)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
        else
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
        emulation::mma_m16n8k16<T>(c, a, b0, b1);
#endif
    }
};

// Two neighbouring floats in shared memory, read at once.
struct alignas(8) Pair {
    float v[2];
};
__device__ __forceinline__ Pair pair_at(const float* p) { return *reinterpret_cast<const Pair*>(p); }

// Elements k and k + 1 of row m, in a matrix that lies as [m][k], or as [k][m] if TRANSPOSED.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_pair(float (&pair)[2], const float* matrix, int stride, int m, int k) {
    if (TRANSPOSED) {
        pair[0] = matrix[k * stride + m], pair[1] = matrix[(k + 1) * stride + m];
    } else {
        const Pair both = pair_at(matrix + m * stride + k);
        pair[0] = both.v[0], pair[1] = both.v[1];
    }
}

// Float32 products that are added one after another. Longer sums are sums of such chains: one chain of 4,096 terms errs
// six times as much, and more than cuBLAS's sums of slices. From Triton's config.py.
constexpr int kLongestChain = PEFT_KERNELS_LONGEST_CHAIN;

// C (16 x 8n) += A (16 x k) B (k x 8n) as below, in float32: a chain for each element.
template <bool TRANSPOSE_A, bool TRANSPOSE_B, int N>
__device__ __forceinline__ void multiply_floats(float (&c)[N][4], const float* a, int stride_a, const float* b,
                                                int stride_b, int k, int n) {
    const int row = lane_row(), col = lane_col();
#pragma unroll 1
    for (int i = 0; i < k; i += 2) {  // two steps at once: all that is adjacent in memory is read as pairs
        float a0[2], a1[2];
        load_pair<TRANSPOSE_A>(a0, a, stride_a, row, i);
        load_pair<TRANSPOSE_A>(a1, a, stride_a, row + 8, i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j >= n) break;
            float b0[2], b1[2];
            if (TRANSPOSE_B) {
                const Pair first = pair_at(b + i * stride_b + j * 8 + col);
                const Pair second = pair_at(b + (i + 1) * stride_b + j * 8 + col);
                b0[0] = first.v[0], b1[0] = first.v[1], b0[1] = second.v[0], b1[1] = second.v[1];
            } else {
                load_pair<false>(b0, b, stride_b, j * 8 + col, i);
                load_pair<false>(b1, b, stride_b, j * 8 + col + 1, i);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                c[j][0] += a0[step] * b0[step];
                c[j][1] += a0[step] * b1[step];
                c[j][2] += a1[step] * b0[step];
                c[j][3] += a1[step] * b1[step];
            }
        }
    }
}

// C (16 x 8n) += A (16 x k) B (k x 8n) by one warp, both operands in shared memory. A lies as [m][k], or as [k][m] if
// TRANSPOSE_A; B lies as [n][k], or as [k][n] if TRANSPOSE_B. k is a multiple of 16, n even and at most N. float stays
// float: no tf32.
template <bool TRANSPOSE_A, bool TRANSPOSE_B, typename T, int N>
__device__ __forceinline__ void multiply(float (&c)[N][4], const T* a, int stride_a, const T* b, int stride_b, int k,
                                         int n) {
    if constexpr (sizeof(T) == 4) {
        constexpr int kPieces = N < 4 ? N : 4;  // at a time: few registers
#pragma unroll
        for (int j0 = 0; j0 < N; j0 += kPieces) {
            if (j0 >= n) break;
            const T* const pieces = b + j0 * 8 * (TRANSPOSE_B ? 1 : stride_b);
#pragma unroll 1
            for (int k0 = 0; k0 < k; k0 += kLongestChain) {
                float sum[kPieces][4] = {};
                multiply_floats<TRANSPOSE_A, TRANSPOSE_B>(
                    sum, a + k0 * (TRANSPOSE_A ? stride_a : 1), stride_a, pieces + k0 * (TRANSPOSE_B ? stride_b : 1),
                    stride_b, min(k - k0, kLongestChain), min(n - j0, kPieces));
#pragma unroll
                for (int j = 0; j < kPieces; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[j0 + j][i] += sum[j][i];
            }
        }
    } else {
        // The 8 x 8 quarters of a 16 x 16 square, in the order the instruction wants them: down first, or across first.
        const int lane = int(threadIdx.x) % 32, inner = lane % 8 + (lane & 8), outer = lane / 16 * 8;
        const int swapped = lane % 8 + outer, across = lane & 8;
        a += TRANSPOSE_A ? swapped * stride_a + across : inner * stride_a + outer;
        b += TRANSPOSE_B ? inner * stride_b + outer : swapped * stride_b + across;
#pragma unroll 1
        for (int i = 0; i < k; i += 16) {
            uint32_t fragment_a[4];
            Mma<T>::template load<TRANSPOSE_A>(fragment_a, a + i * (TRANSPOSE_A ? stride_a : 1));
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                if (j >= n) break;
                uint32_t fragment_b[4];
                Mma<T>::template load<TRANSPOSE_B>(
                    fragment_b, b + i * (TRANSPOSE_B ? stride_b : 1) + j * 8 * (TRANSPOSE_B ? 1 : stride_b));
                Mma<T>::multiply(c[j], fragment_a, fragment_b[0], fragment_b[1]);
                Mma<T>::multiply(c[j + 1], fragment_a, fragment_b[2], fragment_b[3]);
            }
        }
    }
}

}  // namespace peft

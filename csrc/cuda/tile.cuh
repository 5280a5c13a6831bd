// Matrix products of a tile of slots with a tile of candidates: asynchronous copies to shared memory in stages, tensor
// cores for bf16 and fp16, plain fused multiply-adds for fp32. One block holds kSlots x kColumns results in registers, a
// warp 16 kI x 8 kJ of them in the layout of the tensor cores' m16n8 results:
//   results[i][j][2 h + e] is row 16 i + 8 h + lane / 4, column 8 j + 2 (lane % 4) + e of the warp's part.
#pragma once

#include "device.cuh"

namespace ilvr {

constexpr int kSlots = 64, kColumns = 128;
constexpr int kWarpsDown = 2, kWarpsAcross = 4, kThreads = 32 * kWarpsDown * kWarpsAcross;
constexpr int kBlocks = 2;  // on a multiprocessor at a time
constexpr int kStages = 3;  // 72 KB: fits the smallest shared memory of sm_80 and later, twice on sm_80, 90 and 100
constexpr int kI = kSlots / kWarpsDown / 16, kJ = kColumns / kWarpsAcross / 8;
constexpr int kRowBytes = 128;  // of a row in a stage
constexpr int kStageBytes = (kSlots + kColumns) * kRowBytes;
constexpr int kSharedBytes = kStages * kStageBytes;

template <class T>
constexpr int kDepth = kRowBytes / sizeof(T);  // numbers of a row in a stage

using Results = float[kI][kJ][4];

struct Lane {
  int down = threadIdx.x / 32 / kWarpsAcross, across = threadIdx.x / 32 % kWarpsAcross;
  int warp_row = down * 16 * kI, warp_column = across * 8 * kJ;
  int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;

  __device__ int row(int i, int h) const { return warp_row + 16 * i + 8 * h + group; }
  __device__ int column(int j) const { return warp_column + 8 * j + 2 * member; }  // and the next one
};

// Byte of a 16-byte piece of a row in a tile: pieces are permuted so that a column of them falls on all banks.
__device__ inline int piece_at(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A matrix in device memory; aligned: every row begins at a multiple of 16 bytes.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;
  bool aligned;

  __device__ Matrix(const void* pointer, int64_t rows, int64_t columns, int64_t stride)
      : data(static_cast<const T*>(pointer)), rows(rows), columns(columns), stride(stride),
        aligned((reinterpret_cast<uintptr_t>(pointer) | stride * sizeof(T)) % 16 == 0) {}
};

// Starts the copy of kRows rows of kDepth numbers into a tile, zeros where the matrix ends.
template <int kRows, class T>
__device__ void copy_tile(char* tile, const Matrix<T>& from, int64_t first_row, int64_t first_column) {
  constexpr int kPiece = 16 / sizeof(T), kRowsAtOnce = kThreads / 8;
  static_assert(kRows % kRowsAtOnce == 0);
  const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
  const int64_t column = first_column + piece * kPiece, rows_left = from.rows - first_row - row;
  const int columns_left = static_cast<int>(min(max(from.columns - column, int64_t{0}), int64_t{kPiece}));
  const T* source = from.data + (first_row + row) * from.stride + column;
  char* target = tile + piece_at(row, piece);
  if (from.aligned) {
    const uint32_t address = shared_address(target);
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address + i * kRowBytes),
                   "l"(source + i * from.stride), "r"(i < rows_left ? columns_left * static_cast<int>(sizeof(T)) : 0));
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowsAtOnce)
      for (int e = 0; e < kPiece; ++e)
        reinterpret_cast<T*>(target + i * kRowBytes)[e] =
            i < rows_left && e < columns_left ? source[i * from.stride + e] : from_float<T>(0.0f);
  }
}

// copy(step, stage) runs ahead of use(step, stage) by kStages - 1 steps. All threads are past their use at the end.
template <class Copy, class Use>
__device__ void pipeline(char* stages, int64_t steps, Copy copy, Use use) {
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step, stages + step * kStageBytes);
    asm volatile("cp.async.commit_group;");
  }
  int here = 0, ahead = kStages - 1;
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    if (step + kStages - 1 < steps) copy(step + kStages - 1, stages + ahead * kStageBytes);
    asm volatile("cp.async.commit_group;");
    use(step, stages + here * kStageBytes);
    here = here + 1 == kStages ? 0 : here + 1;
    ahead = ahead + 1 == kStages ? 0 : ahead + 1;
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
}

__device__ inline void load_matrices(uint32_t (&out)[4], const char* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(from)));
}

__device__ inline void load_transposed(uint32_t (&out)[4], const char* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(from)));
}

#define ILVR_MMA(kind)                                                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind                                                  \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                             \
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ void multiply(float (&out)[4], const uint32_t (&a)[4], const uint32_t* b) {
  if constexpr (__is_same(T, __half)) ILVR_MMA("f16");
  else ILVR_MMA("bf16");
}

// Products on one stage. The squared lengths of the candidates are summed on the way: of the warps that hold the same
// candidates each takes a part, kMine blocks of 8.
template <class T>
struct Product {
  static constexpr int kMine = kJ / kWarpsDown;
  using Squares = float[kMine];

  // results += slots . candidates^T; both tiles hold rows of features
  __device__ static void dots(const char* slots, const char* candidates, const Lane& at, Results& results,
                              Squares& squares) {
#pragma unroll
    for (int k = 0; k < kDepth<T> / 16; ++k) {
      uint32_t a[kI][4], b[kJ / 2][4];
      for (int i = 0; i < kI; ++i)
        load_matrices(a[i], slots + piece_at(at.warp_row + 16 * i + at.lane % 16, 2 * k + at.lane / 16));
      for (int j = 0; j < kJ / 2; ++j)
        load_matrices(b[j], candidates + piece_at(at.warp_column + 16 * j + at.lane % 8 + at.lane / 16 * 8,
                                                  2 * k + at.lane / 8 % 2));
      for (int i = 0; i < kI; ++i)
        for (int j = 0; j < kJ; ++j) multiply<T>(results[i][j], a[i], b[j / 2] + j % 2 * 2);
      for (int j = 0; j < kMine; ++j)
        for (int word = 0; word < 2; ++word) {
          uint32_t mine = 0;
          for (int down = 0, all = j; down < kWarpsDown; ++down, all += kMine)
            if (down == at.down) mine = b[all / 2][all % 2 * 2 + word];
          const float2 pair = unpack<T>(mine);
          squares[j] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares[j]));
        }
    }
  }

  __device__ static void store_squares(const Squares& squares, const Lane& at, float* out) {
    for (int j = 0; j < kMine; ++j) {
      float sum = squares[j] + __shfl_xor_sync(kFullWarp, squares[j], 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (at.member == 0) out[at.warp_column + 8 * (at.down * kMine + j) + at.group] = sum;
    }
  }

  // results += weights . candidates. weights: rows of kDepth candidates; candidates: parts of kDepth features, each
  // with a row for each candidate. fp16 has too few exponents for weights over lengths, so there the candidates are
  // scaled instead, by inverse[candidate].
  __device__ static void weighted(const char* weights, const char* candidates, const float* inverse, const Lane& at,
                                  Results& results) {
#pragma unroll
    for (int k = 0; k < kDepth<T> / 16; ++k) {
      uint32_t a[kI][4], b[kJ / 2][4];
      for (int i = 0; i < kI; ++i)
        load_matrices(a[i], weights + piece_at(at.warp_row + 16 * i + at.lane % 16, 2 * k + at.lane / 16));
      for (int j = 0; j < kJ / 2; ++j) {
        const int column = at.warp_column + 16 * j;
        const char* part = candidates + column / kDepth<T> * kDepth<T> * kRowBytes;
        load_transposed(b[j], part + piece_at(16 * k + at.lane % 16, column % kDepth<T> / 8 + at.lane / 16));
      }
      if constexpr (__is_same(T, __half))
        for (int word = 0; word < 4; ++word) {
          const float* scale = inverse + 16 * k + word % 2 * 8 + 2 * at.member;
          for (int j = 0; j < kJ / 2; ++j) {
            const float2 pair = unpack<T>(b[j][word]);
            b[j][word] = pack<T>({pair.x * scale[0], pair.y * scale[1]});
          }
        }
      for (int i = 0; i < kI; ++i)
        for (int j = 0; j < kJ; ++j) multiply<T>(results[i][j], a[i], b[j / 2] + j % 2 * 2);
    }
  }
};

template <>
struct Product<float> {
  using Squares = float[2 * kJ];

  __device__ static float4 quad(const char* tile, int row, int piece) {
    return *reinterpret_cast<const float4*>(tile + piece_at(row, piece));
  }

  __device__ static void dots(const char* slots, const char* candidates, const Lane& at, Results& results,
                              Squares& squares) {
#pragma unroll 2
    for (int k = 0; k < kDepth<float> / 4; ++k) {
      float4 a[2 * kI];
      for (int i = 0; i < 2 * kI; ++i) a[i] = quad(slots, at.row(i / 2, i % 2), k);
      for (int j = 0; j < 2 * kJ; ++j) {
        const float4 b = quad(candidates, at.column(j / 2) + j % 2, k);
        for (int i = 0; i < 2 * kI; ++i) {
          float& result = results[i / 2][j / 2][i % 2 * 2 + j % 2];
          result = fmaf(a[i].x, b.x, fmaf(a[i].y, b.y, fmaf(a[i].z, b.z, fmaf(a[i].w, b.w, result))));
        }
        if (k == at.group)  // the lanes of a warp that hold the same candidates take turns
          squares[j] = fmaf(b.x, b.x, fmaf(b.y, b.y, fmaf(b.z, b.z, fmaf(b.w, b.w, squares[j]))));
      }
    }
  }

  __device__ static void store_squares(const Squares& squares, const Lane& at, float* out) {
    for (int j = 0; j < 2 * kJ; ++j) {
      float sum = squares[j];
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
      if (at.down == 0 && at.group == 0) out[at.column(j / 2) + j % 2] = sum;
    }
  }

  __device__ static void weighted(const char* weights, const char* candidates, const float*, const Lane& at,
                                  Results& results) {
#pragma unroll 2
    for (int k = 0; k < kDepth<float>; ++k) {
      float a[2 * kI];
      for (int i = 0; i < 2 * kI; ++i)
        a[i] = *reinterpret_cast<const float*>(weights + piece_at(at.row(i / 2, i % 2), k / 4) + k % 4 * 4);
      for (int j = 0; j < kJ; ++j) {
        const int part = at.column(j) / kDepth<float>, column = at.column(j) % kDepth<float>;
        const float2 b = *reinterpret_cast<const float2*>(candidates + part * kDepth<float> * kRowBytes +
                                                          piece_at(k, column / 4) + column % 4 * 4);
        for (int i = 0; i < 2 * kI; ++i) {
          float* pair = results[i / 2][j] + i % 2 * 2;
          pair[0] = fmaf(a[i], b.x, pair[0]);
          pair[1] = fmaf(a[i], b.y, pair[1]);
        }
      }
    }
  }
};

}  // namespace ilvr

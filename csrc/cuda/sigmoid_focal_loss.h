// The focal loss of all logits, read in place, in NCHW or channels_last order.
//
// A level of an image is a matrix: classes x points (NCHW) or points x classes (channels_last), its
// rows contiguous. A thread owns a few columns (16 bytes, or one where a plane is odd or not
// aligned) of up to 16 rows. Nearly all rows are plain: no element belongs to the true class of its
// point or to an ignored point, all are negative and need no label. So a thread looks at its labels
// once, to mark the rows that are not.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../core/focal.h"
#include "fast_math.h"
#include "launch.h"
#include "numbers.h"

namespace fcos::cuda {

constexpr int kMaxRows = 16; // of a thread: float sums stay short, and there is a bit for each

// One level of the batch.
struct Matrix {
  const void* data;
  void* grad;
  RowStrides data_strides, grad_strides;
  int64_t first_point;
  int rows, columns;
  bool columns_are_classes;
  bool is_vectorised;
  int groups;   // of columns
  int slices;   // of rows; a thread has one group of one slice of one image
  int row_step; // between the rows of a thread, and what it means in memory
  int data_step, grad_step;
};

struct FocalPlan {
  Matrix matrix[kMaxLevels]; // entry i is for the i-th last level
  BlocksOfLevels blocks;
  const int32_t* labels; // [B, P]
  int64_t num_points;
  unsigned num_images;
  int num_classes;
  double positive_weight, negative_weight, gamma;
  LossScale scale;
};

// The elements that a thread owns.
struct Patch {
  unsigned image;
  int first_row, num_rows;
  int first_column;
  const int32_t* labels; // of this image and level

  __device__ int64_t offset(const RowStrides& s) const {
    return image * s.image + first_row * s.row + first_column * s.column;
  }
};

// False for surplus threads.
__device__ bool find_patch(
    const FocalPlan& plan, const Matrix& m, int block, int vector, Patch* patch) {
  unsigned index = unsigned(block) * kThreads + threadIdx.x;
  unsigned group = index % unsigned(m.groups), rest = index / unsigned(m.groups);
  int slice = int(rest % unsigned(m.slices));
  patch->image = rest / unsigned(m.slices);
  patch->first_column = int(group) * vector;
  patch->labels = plan.labels + patch->image * plan.num_points + m.first_point;
  patch->first_row = m.row_step == 1 ? slice * kMaxRows : slice;
  patch->num_rows = min((m.rows - patch->first_row + m.row_step - 1) / m.row_step, kMaxRows);
  return patch->image < plan.num_images;
}

__device__ bool is_label(const FocalPlan& plan, int label) {
  return label >= -1 && label <= plan.num_classes;
}

// Bit i is set where row i is not plain. Labels are checked together, so that their loads do not
// wait for each other.
template <int V>
__device__ unsigned find_special_rows(const FocalPlan& plan, const Matrix& m, const Patch& patch) {
  unsigned special = 0;
  bool good = true;
  if (m.columns_are_classes) {
#pragma unroll 4
    for (int i = 0; i < patch.num_rows; ++i) {
      int label = patch.labels[patch.first_row + i * m.row_step];
      good &= is_label(plan, label);
      bool has_true_class = unsigned(label - patch.first_column) < unsigned(V);
      special |= unsigned(has_true_class || label == -1) << i;
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      int label = patch.labels[patch.first_column + j];
      good &= is_label(plan, label);
      unsigned row = unsigned(label - patch.first_row);
      special |= label == -1 ? ~0u : row < unsigned(patch.num_rows) ? 1u << row : 0u;
    }
  }
  FCOS_ASSERT(
      good, "sigmoid_focal_loss: labels must lie in [-1, K]: -1 is ignored, K is background");
  return special;
}

// One bit per element of a row.
struct SpecialElements {
  unsigned positive = 0; // of the true class of its point
  unsigned ignored = 0;
};

template <int V>
__device__ SpecialElements find_special_elements(const Matrix& m, const Patch& patch, int row) {
  SpecialElements special;
#pragma unroll 1 // rare: it shall take few registers
  for (int j = 0; j < V; ++j) {
    int column = patch.first_column + j;
    int label = patch.labels[m.columns_are_classes ? row : column];
    special.positive |= unsigned(label == (m.columns_are_classes ? column : row)) << j;
    special.ignored |= unsigned(label == -1) << j;
  }
  return special;
}

// Where a thread is in its patch.
template <class T>
struct Cursor {
  int rows_left, last_row;
  unsigned special_rows;
  const T* data;
  T* grad;

  __device__ int row(const Matrix& m, int k) const {
    return last_row - (rows_left - 1 - k) * m.row_step;
  }
  __device__ void advance(const Matrix& m, int rows) {
    rows_left -= rows;
    special_rows >>= rows;
    data += rows * m.data_step, grad += rows * m.grad_step;
  }
};

// Passes the next `Count` rows to the pass. All loads start before the first row is computed.
// Special elements count as negatives of logit minus infinity, which cost nothing; then the positive
// ones are computed one by one.
template <class T, int V, int Count, class Pass>
__device__ __forceinline__ void take_rows(
    const Matrix& m, const Patch& patch, const Cursor<T>& at, Pass& pass) {
  Vector<T, V> logits[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    logits[k] = load<T, V>(at.data + k * m.data_step, Pass::kLastUse);
  }
  bool any_special = (at.special_rows & ((1u << Count) - 1)) != 0;
  if (any_special) {
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      SpecialElements special = find_special_elements<V>(m, patch, at.row(m, k));
      set_minus_infinity(&logits[k], special.positive | special.ignored);
    }
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    typename Compute<T>::Type z[V];
    unpack<T, V>(logits[k], z);
    pass.negatives(z, at.grad + k * m.grad_step);
  }
  if (any_special) {
#pragma unroll 1
    for (int k = 0; k < Count; ++k) {
      unsigned left = find_special_elements<V>(m, patch, at.row(m, k)).positive;
      for (; left != 0; left &= left - 1) {
        int j = __ffs(int(left)) - 1;
        pass.positive(-widen(at.data[k * m.data_step + j]), at.grad + k * m.grad_step + j);
      }
    }
  }
}

template <class T, int V, class Pass>
__device__ __forceinline__ void take_patch(
    const FocalPlan& plan, const Matrix& m, const Patch& patch, Pass& pass) {
  Cursor<T> at = {
      patch.num_rows, patch.first_row + (patch.num_rows - 1) * m.row_step,
      find_special_rows<V>(plan, m, patch),
      static_cast<const T*>(m.data) + patch.offset(m.data_strides),
      static_cast<T*>(m.grad) + patch.offset(m.grad_strides)};
  constexpr int kAtOnce = V > 1 ? 2 : 4;
  for (; at.rows_left >= kAtOnce; at.advance(m, kAtOnce)) {
    take_rows<T, V, kAtOnce>(m, patch, at, pass);
  }
  for (; at.rows_left > 0; at.advance(m, 1)) {
    take_rows<T, V, 1>(m, patch, at, pass);
  }
}

// What a kernel computes from the logits. Errors are below the rounding of half-precision logits and
// gradients, but not of float32. Exponents above 2 multiply every error, so the kernels for arbitrary
// exponents use exact functions.
template <class T, int Gamma, bool Loss, bool Grad, int V>
struct Pass {
  using Real = typename Compute<T>::Type;
  using Fast = std::conditional_t<Loss, FastMath, CoarseMath>;
  using Finer = std::conditional_t<(sizeof(T) == 4), FineMath, Fast>;
  using Math = std::conditional_t<(sizeof(T) == 8 || Gamma < 0), ScalarMath<Real>, Finer>;
  static constexpr bool kLastUse = Grad; // else a backward pass comes soon

  const FocalPlan& plan;
  Real scale = 0; // of the gradient of negatives
  Real of_negatives[V] = {};
  double of_positives = 0;

  __device__ explicit Pass(const FocalPlan& plan) : plan(plan) {
    if constexpr (Grad) {
      scale = plan.scale.of_gradient<Real>() * Real(plan.negative_weight);
    }
  }

  __device__ void negatives(const Real (&z)[V], T* grad) {
    Real slopes[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      FocalTerms<Real> terms = focal_terms<Math, Gamma>(z[j], Real(plan.gamma));
      slopes[j] = scale * terms.slope;
      if constexpr (Loss) {
        of_negatives[j] += terms.loss;
      }
    }
    if constexpr (Grad) {
      store<T, V>(grad, slopes);
    }
  }
  __device__ void positive(Real z, T* grad) {
    FocalTerms<Real> terms = focal_terms<Math, Gamma>(z, Real(plan.gamma));
    if constexpr (Loss) {
      of_positives += double(terms.loss);
    }
    if constexpr (Grad) { // dz/dx is -1
      Real weight = plan.scale.of_gradient<Real>() * Real(plan.positive_weight);
      narrow(-weight * terms.slope, grad);
    }
  }

  __device__ double loss() const {
    double sum = 0;
    for (int j = 0; j < V; ++j) {
      sum += double(of_negatives[j]);
    }
    return plan.negative_weight * sum + plan.positive_weight * of_positives;
  }
};

template <class Pass, class T, int V>
__device__ double pass_over(const FocalPlan& plan, const Matrix& m, const Patch& patch) {
  Pass pass(plan);
  take_patch<T, V>(plan, m, patch, pass);
  return pass.loss();
}

// The loss and the gradients of the elements that a thread of this block owns.
template <class T, int Gamma, bool Loss, bool Grad>
__device__ double take_logits(const FocalPlan& plan, int block) {
  constexpr int V = kVectorBytes / sizeof(T);
  int level = plan.blocks.level_of(block);
  const Matrix& m = plan.matrix[level];
  Patch patch;
  if (!find_patch(plan, m, block - plan.blocks.first[level], m.is_vectorised ? V : 1, &patch)) {
    return 0;
  }
  return m.is_vectorised ? pass_over<Pass<T, Gamma, Loss, Grad, V>, T, V>(plan, m, patch)
                         : pass_over<Pass<T, Gamma, Loss, Grad, 1>, T, 1>(plan, m, patch);
}

// ---- host ----

inline Matrix make_matrix(const FocalLoss& args, const Map& map) {
  Matrix m{};
  m.data = map.data, m.grad = map.grad;
  m.first_point = map.first_point;
  m.columns_are_classes = has_channels_last(map);
  m.rows = m.columns_are_classes ? map.num_points : args.num_classes;
  m.columns = m.columns_are_classes ? args.num_classes : map.num_points;
  m.data_strides = make_row_strides(map.data_strides, m.columns_are_classes);
  m.grad_strides = make_row_strides(map.grad_strides, m.columns_are_classes);
  int64_t bytes = bytes_of(args.dtype);
  m.is_vectorised = has_vectors(m.data, m.data_strides, m.columns, bytes) &&
                    (m.grad == nullptr || has_vectors(m.grad, m.grad_strides, m.columns, bytes));
  m.groups = m.is_vectorised ? int(m.columns * bytes / kVectorBytes) : m.columns;
  m.slices = int(divide_up(m.rows, kMaxRows));
  // Neighboring threads share rows. Where rows are short (few classes), the next thread's first row
  // is the next in memory, so that a warp reads one piece; long rows are cut into runs.
  m.row_step = m.columns_are_classes ? m.slices : 1;
  m.data_step = int(m.data_strides.row * m.row_step);
  m.grad_step = int(m.grad_strides.row * m.row_step);
  return m;
}

// Small levels come first: the many blocks of the large ones even out what these leave idle. False
// where the maps are too large for one launch.
inline bool make_plan(const FocalLoss& args, FocalPlan* plan) {
  *plan = FocalPlan{};
  int64_t total = 0;
  for (int l = args.logits.num_levels - 1; l >= 0; --l) {
    Matrix m = make_matrix(args, args.logits.level[l]);
    int64_t threads = args.num_images * m.groups * m.slices;
    int64_t blocks = divide_up(threads, kThreads);
    total += blocks;
    int64_t step = std::max(m.data_strides.row, m.grad_strides.row) * m.row_step;
    if (threads > INT_MAX || total > kMaxBlocks || step > INT_MAX / kMaxRows) {
      return false;
    }
    plan->matrix[plan->blocks.num_levels] = m;
    plan->blocks.append(blocks);
  }
  plan->labels = args.labels;
  plan->num_points = args.num_points;
  plan->num_images = unsigned(args.num_images);
  plan->num_classes = args.num_classes;
  plan->positive_weight = args.alpha < 0 ? 1 : args.alpha;
  plan->negative_weight = args.alpha < 0 ? 1 : 1 - args.alpha;
  plan->gamma = args.gamma;
  plan->scale = args.scale;
  return true;
}

} // namespace fcos::cuda

// Of an operation with two derivatives: its value, its derivative, or the derivative of that.
#pragma once

namespace hvp {

enum class Level : int { kValue, kBackward, kDoubleBackward };

}  // namespace hvp

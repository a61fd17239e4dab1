// Large blocks of memory for gradients, kept between backward passes with their pages.
//
// An allocator that gives a large block back to the system when it is freed makes the kernel clear
// every page of the next one. A block from here has one owner at a time, who gives it back; it then
// waits for the next borrower. What no pass asks for goes back to the system.
#pragma once

#include <cstddef>

namespace dpmmd::blocks {

// Memory of a borrower alone, at the start of a page; `data` is null where there is none.
struct Block {
    void* data;
    std::size_t bytes;  // at least as many as were asked for
};

// All of these may be called from any thread, and in a forked child.

// A block, uninitialised; none where blocks are not kept or the system has no memory left.
Block borrow(std::size_t bytes);
void give_back(Block block) noexcept;

// A backward pass begins: blocks that the last two passes left alone go back to the system.
void begin_pass() noexcept;
// Every block that nobody has borrowed goes back to the system. Returns their bytes.
std::size_t return_idle() noexcept;
// Whether blocks are kept from now on; if not, they go back to the system as they are given back.
void keep(bool kept) noexcept;

}  // namespace dpmmd::blocks

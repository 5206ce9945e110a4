// Codes of an ONNX graph in the order of the tensor cores, as slimc/backends/cuda/fragments.py makes it of packed tensors.
//
// A graph holds a matrix of `rows` outputs as INT4 [columns, rows], two codes a byte, the even one in the low half.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace slim {

constexpr int kTileRows = 16;      // rows of an instruction
constexpr int kUnitBytes = 32;     // bytes of a row in a unit: 64 columns, or 128 of which half are kept
constexpr int kFactorGroup = 64;   // columns of a factor that share a scale, and ranks to which factors are padded
constexpr uint8_t kZeros = 0x88;   // two codes of zero
constexpr int kFirstTwo = 0b0100;  // the metadata of four columns of which the first two are kept

inline int divided(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// A matrix of codes in a graph.
struct Codes {
    const uint8_t* bytes;
    int rows, columns;

    // Unsigned, with 8 for zero.
    int at(int row, int column) const {
        const int64_t index = static_cast<int64_t>(column) * rows + row;
        return ((bytes[index / 2] >> (4 * (index % 2))) & 15) ^ 8;
    }
};

// Rows of bytes, filled up to whole tiles and units.
struct Stream {
    int tiles, units;
    std::vector<uint8_t> bytes;

    Stream(int rows, int row_bytes, uint8_t fill)
        : tiles(divided(rows, kTileRows)),
          units(divided(row_bytes, kUnitBytes)),
          bytes(static_cast<size_t>(tiles) * kTileRows * units * kUnitBytes, fill) {}

    uint8_t& at(int row, int byte) { return bytes[static_cast<size_t>(row) * units * kUnitBytes + byte]; }

    // Visit every byte with its word and lane: visit(byte, word of the fragments, instruction, half, place, lane's t).
    template <typename Visit>
    void visit(Visit&& visit) const {
        for (int tile = 0; tile < tiles; ++tile)
            for (int unit = 0; unit < units; ++unit)
                for (int row = 0; row < kTileRows; ++row) {
                    const uint8_t* from =
                        bytes.data() + (static_cast<size_t>(tile * kTileRows + row) * units + unit) * kUnitBytes;
                    for (int byte = 0; byte < kUnitBytes; ++byte)
                        visit(from[byte], (static_cast<size_t>(tile) * units + unit) * 32, byte / 8, row / 8, row % 8,
                              byte / 4 % 2, byte % 4);
                }
    }
};

// int32 [row tiles][units][32 lanes][4 instructions].
inline std::vector<uint32_t> code_words(const Stream& stream) {
    std::vector<uint32_t> words(stream.bytes.size() / 4);
    stream.visit([&](uint8_t byte, size_t unit, int instruction, int half, int g, int place, int t) {
        const int part = half + 2 * place;
        words[(unit + g * 4 + t) * 4 + instruction] |= (byte & 15u) << (4 * part) | (byte >> 4 & 15u) << (16 + 4 * part);
    });
    return words;
}

// int32 [row tiles][units][32 lanes][2]; a byte of the stream is the metadata of four columns.
inline std::vector<uint32_t> metadata_words(const Stream& stream) {
    std::vector<uint32_t> words(stream.bytes.size() / 8);
    stream.visit([&](uint8_t index, size_t unit, int instruction, int half, int g, int place, int t) {
        const int lane = 4 * g + 2 * (instruction % 2) + place;
        words[(unit + lane) * 2 + instruction / 2] |= static_cast<uint32_t>(index) << (16 * half + 4 * t);
    });
    return words;
}

// A dense matrix; `rows` more than it has are zeros.
inline Stream dense_stream(const Codes& codes, int rows) {
    Stream stream(rows, divided(codes.columns, 2), kZeros);
    for (int column = 0; column < codes.columns; ++column)
        for (int row = 0; row < codes.rows; ++row) {
            uint8_t& byte = stream.at(row, column / 2);
            byte = column % 2 ? (byte & 15) | codes.at(row, column) << 4 : (byte & 0xf0) | codes.at(row, column);
        }
    return stream;
}

// The kept codes of a 2:4 matrix, and where they are; false if more than two of four columns are not zero.
inline bool sparse_streams(const Codes& codes, Stream& kept, Stream& places) {
    const int groups = divided(codes.columns, 4);
    for (int group = 0; group < groups; ++group)
        for (int row = 0; row < codes.rows; ++row) {
            int columns[4], count = 0;
            const int size = std::min(4, codes.columns - 4 * group);
            for (int i = 0; i < size; ++i)
                if (codes.at(row, 4 * group + i) != 8) {
                    if (count == 2) return false;
                    columns[count++] = i;
                }
            // A code of zero may have been kept as well: which one then stands for it makes no difference.
            for (int i = 0; i < 4 && count < 2; ++i)
                if (count == 0 || columns[0] != i) columns[count++] = i;
            const int first = std::min(columns[0], columns[1]), second = std::max(columns[0], columns[1]);
            const auto code = [&](int i) { return i < size ? codes.at(row, 4 * group + i) : 8; };
            kept.at(row, group) = static_cast<uint8_t>(code(first) | code(second) << 4);
            places.at(row, group) = static_cast<uint8_t>(first | second << 2);
        }
    return true;
}

// int32 [row tiles][groups][8]: the scales of rows g, in the low half, and g + 8. `scale(row, group)` is a number's bits.
template <typename Scale>
std::vector<uint32_t> scale_words(int rows, int groups, int tiles, Scale&& scale) {
    std::vector<uint32_t> words(static_cast<size_t>(tiles) * groups * 8);
    for (int row = 0; row < rows; ++row)
        for (int group = 0; group < groups; ++group)
            words[(static_cast<size_t>(row / kTileRows) * groups + group) * 8 + row % 8] |=
                static_cast<uint32_t>(scale(row, group)) << (row % kTileRows / 8 * 16);
    return words;
}

}  // namespace slim

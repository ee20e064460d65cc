package cachefilestest

import "encoding/binary"

// Opcodes of the kernel's messages.
const (
	OpOpen  = 0
	OpClose = 1
	OpRead  = 2
)

// Message encodes a message with any header but the right length.
func Message(id, op, object uint32, payload ...byte) []byte {
	p := binary.NativeEndian.AppendUint32(nil, id)
	p = binary.NativeEndian.AppendUint32(p, op)
	p = binary.NativeEndian.AppendUint32(p, uint32(16+len(payload)))
	p = binary.NativeEndian.AppendUint32(p, object)
	return append(p, payload...)
}

// OpenMessage encodes an OPEN (struct cachefiles_open).
func OpenMessage(id, object uint32, fd int32, volume, cookie string) []byte {
	p := binary.NativeEndian.AppendUint32(nil, uint32(len(volume)+1))
	p = binary.NativeEndian.AppendUint32(p, uint32(len(cookie)))
	p = binary.NativeEndian.AppendUint32(p, uint32(fd))
	p = binary.NativeEndian.AppendUint32(p, 0)
	p = append(append(append(p, volume...), 0), cookie...)
	return Message(id, OpOpen, object, p...)
}

// ReadMessage encodes a READ (struct cachefiles_read).
func ReadMessage(id, object uint32, off, n uint64) []byte {
	p := binary.NativeEndian.AppendUint64(nil, off)
	return Message(id, OpRead, object, binary.NativeEndian.AppendUint64(p, n)...)
}

package cachefiles

// A Message is a decoded message, for tests from outside.
type Message struct {
	ID, Op, Object uint32
	Key            Key
	FD             int
	Off, N         int64
}

func Parse(p []byte) (Message, error) {
	m, err := parse(p)
	return Message{m.id, m.op, m.object, m.key, m.fd, m.off, m.n}, err
}

// FD is the file's descriptor, for a look at it.
func (f *File) FD() (n int) {
	_ = control(f.f, func(fd int) error { n = fd; return nil })
	return n
}

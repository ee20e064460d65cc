package cachefilestest

import (
	"encoding/binary"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/cachefiles"
)

// A device is the kernel as one daemon sees it.
type device struct {
	k     *Kernel
	wake  int // the daemon's eventfd, our copy
	gone  bool
	files map[int]*file // by the daemon's number
}

// notify makes the daemon's descriptor readable.
func (d *device) notify() {
	_, _ = unix.Write(d.wake, binary.NativeEndian.AppendUint64(nil, 1)) // full means readable already
}

// Read gives the next message.
func (d *device) Read(fd int, p []byte) (int, error) {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	var counter [8]byte
	_, _ = unix.Read(fd, counter[:])
	if d.gone || k.dead {
		return 0, unix.EIO
	}
	r := k.pick()
	if r == nil {
		return 0, unix.EAGAIN
	}
	m, err := d.message(r)
	if err != nil {
		k.take(r)
		k.finish(r, err)
		if r.o != nil && r.o.opening == r {
			k.refuse(r.o)
		}
		return 0, err
	}
	if len(m) > len(p) {
		k.t.Errorf("a read of %d bytes for a message of %d", len(p), len(m))
	}
	r.fresh, r.read = false, true
	if r.op == OpClose || r.raw != nil {
		k.take(r)
		k.finish(r, nil)
	}
	return copy(p, m), nil
}

// pick returns the first request that can be read. A READ of an object without a
// file makes an OPEN first. The caller holds k.mu.
func (k *Kernel) pick() *request {
	for i := 0; i < len(k.requests); i++ { // grows
		r := k.requests[i]
		if !r.fresh {
			continue
		}
		if r.op == OpRead && r.raw == nil {
			if r.o.open && r.o.file != nil && !r.o.file.closed() {
				return r
			}
			k.collect()
			k.reopen(r.o)
			continue
		}
		return r
	}
	return nil
}

// message encodes r and installs the file that comes with it.
func (d *device) message(r *request) ([]byte, error) {
	switch {
	case r.raw != nil && r.withFD:
		f, err := d.install(nil)
		if err != nil {
			return nil, err
		}
		p := append([]byte{}, r.raw...)
		binary.NativeEndian.PutUint32(p[24:], uint32(f.fd))
		return p, nil
	case r.raw != nil:
		return r.raw, nil
	case r.op == OpClose:
		return Message(r.id, OpClose, r.object), nil
	case r.op == OpRead:
		return ReadMessage(r.id, r.o.id, uint64(r.off), uint64(r.n)), nil
	}
	k, o := d.k, r.o
	if len(k.readErrs) > 0 {
		err := k.readErrs[0]
		k.readErrs = k.readErrs[1:]
		return nil, err
	}
	if o.file != nil {
		return nil, unix.EEXIST
	}
	f, err := d.install(o)
	if err != nil {
		return nil, err
	}
	k.nextObject++
	o.id, o.file = k.nextObject, f
	return OpenMessage(r.id, o.id, int32(f.fd), o.key.Volume, o.key.Cookie), nil
}

// install makes a file in the daemon, not close-on-exec, as the kernel does.
func (d *device) install(o *object) (*file, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], 0); err != nil {
		return nil, err
	}
	unix.CloseOnExec(p[0])
	f := &file{o: o, fd: p[1], pipe: p[0]}
	d.files[f.fd] = f
	d.k.files = append(d.k.files, f)
	return f, nil
}

// refuse is the end of an OPEN that failed. The caller holds k.mu.
func (k *Kernel) refuse(o *object) {
	o.opening = nil
	if o.content == nil && k.live[o.key] == o {
		delete(k.live, o.key) // was never open
		o.dropped = true
	}
	k.notify() // a READ that waits asks again
}

func (d *device) Culling(int) bool {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	return d.k.culling
}

func (d *device) Command(_ int, command string) error {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	word, args, _ := strings.Cut(command, " ")
	switch {
	case d.gone || k.dead:
		return unix.EIO
	case word == "copen":
		return d.copen(args)
	case word == "restore" && !k.noRestore:
		for _, r := range k.requests {
			r.fresh = true
		}
		k.notify()
		return nil
	}
	return unix.EOPNOTSUPP
}

// copen answers an OPEN.
func (d *device) copen(args string) error {
	k := d.k
	first, second, _ := strings.Cut(args, ",")
	id, err1 := strconv.ParseUint(first, 0, 32)
	size, err2 := strconv.ParseInt(second, 0, 64)
	if err1 != nil || err2 != nil || size < -4095 {
		k.t.Errorf("copen %s: not understood", args)
		return unix.EINVAL
	}
	if s := k.sent[uint32(id)]; s != nil {
		s.answers++
		return nil
	}
	r := k.find(uint32(id))
	if r == nil || r.op != OpOpen || !r.read {
		k.wrong(uint32(id), "copen "+args)
		return unix.EINVAL
	}
	k.collect()
	o := r.o
	k.take(r)
	switch {
	case size < 0:
		k.finish(r, unix.Errno(-size))
		k.refuse(o)
	case o.file == nil:
		k.finish(r, unix.EBADFD)
		k.refuse(o)
	default:
		o.opening = nil
		k.accept(o, size)
		k.finish(r, nil)
		if o.refs == 0 {
			k.drop(o)
		}
		k.notify() // READs may have waited
	}
	return nil
}

// wrong reports an answer to a request that was answered before, or never made. One
// that the kernel has ended itself may be answered late. The caller holds k.mu.
func (k *Kernel) wrong(id uint32, what string) {
	if answered, known := k.ended[id]; answered || !known {
		k.t.Errorf("%s: message %d does not wait for that (answered before: %v)", what, id, answered)
	}
}

// CommandIn finds objects by their path.
func (d *device) CommandIn(_ int, _, dir, command string) error {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	word, name, _ := strings.Cut(command, " ")
	if d.gone || k.dead {
		return unix.EIO
	}
	place := path.Join(dir, name)
	var found []cachefiles.Key
	for key := range k.disk {
		if key.Path() != place && cachefiles.VolumePath(key.Volume) != place {
			continue
		}
		for l := range k.live {
			if l == key || l.Volume == key.Volume && key.Path() != place {
				return unix.EBUSY
			}
		}
		found = append(found, key)
	}
	if len(found) == 0 {
		return unix.ENOENT
	}
	if word == "cull" {
		for _, key := range found {
			delete(k.disk, key)
		}
	}
	return nil
}

func (d *device) Complete(fd int, id uint32) error {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	f := d.files[fd]
	if d.gone || f == nil {
		return unix.EBADF
	}
	if s := k.sent[id]; s != nil {
		s.answers++
		return nil
	}
	r := k.find(id)
	switch {
	case r == nil || r.op != OpRead || !r.read:
		if !k.dead {
			k.wrong(id, "READ_COMPLETE")
		}
		return unix.EINVAL
	case r.o != f.o:
		k.t.Errorf("READ_COMPLETE of message %d through the file of %v, not of %v", id, f.o, r.o.key)
		return unix.EINVAL
	}
	k.take(r)
	k.finish(r, nil)
	return nil
}

func (d *device) WriteAt(fd int, p []byte, off int64) (int, error) {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	f, err := d.attached(fd)
	if err != nil {
		return 0, err
	}
	if off%page != 0 || len(p)%page != 0 {
		k.t.Errorf("write of %d bytes at %d: not aligned", len(p), off)
		return 0, unix.EINVAL
	}
	if k.writeErr != nil {
		return 0, k.writeErr
	}
	return unix.Pwrite(int(f.o.content.f.Fd()), p, off)
}

func (d *device) Seek(fd int, off int64, whence int) (int64, error) {
	k := d.k
	k.mu.Lock()
	defer k.mu.Unlock()
	f, err := d.attached(fd)
	if err != nil {
		return 0, err
	}
	return unix.Seek(int(f.o.content.f.Fd()), off, whence)
}

// attached returns the file with number fd if it can be used.
func (d *device) attached(fd int) (*file, error) {
	f := d.files[fd]
	switch {
	case d.gone || f == nil || f.o == nil:
		return nil, unix.EBADF
	case f.o.dropped || f.o.file != f:
		return nil, unix.ENOBUFS
	case !f.o.open:
		d.k.t.Errorf("the file of %v is used before it was accepted", f.o.key)
		return nil, unix.ENOBUFS
	case f.o.attach > 0:
		f.o.attach--
		return nil, unix.ENOBUFS
	}
	return f, nil
}

package daemon

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// inUse says whether anybody but f's own description has the file open: a
// mounted EROFS, also one that is only reachable from another mount namespace
// or through an overlay. umount(2) returning is no proof that those are gone,
// and reads of a file that is no longer marked would find zeros in its holes.
//
// A write lease is granted only to a file's sole opener (fs/locks.c
// check_conflicting_open, 6.18); it is given back at once. f must be open
// read-write.
func inUse(f *os.File) (bool, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return true, err
	}
	busy := true
	var lerr error
	err = conn.Control(func(fd uintptr) {
		if _, lerr = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_WRLCK); lerr != nil {
			return
		}
		busy = false
		_, lerr = unix.FcntlInt(fd, unix.F_SETLEASE, unix.F_UNLCK)
	})
	if errors.Is(lerr, unix.EAGAIN) {
		lerr = nil
	}
	return busy, errors.Join(err, lerr)
}

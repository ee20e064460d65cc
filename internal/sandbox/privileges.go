package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fixed are the bits that keep user 0 from being anybody special to exec, for ever
// (capabilities(7)). With them, without inheritable and ambient capabilities, and with
// no_new_privs, no program brings a capability back; so the bounding set stays as it is,
// which would take 40 calls more while readers wait.
const (
	fixed = noRoot | noRoot<<1 | keepCaps<<1 | noAmbientRaise | noAmbientRaise<<1

	// Of linux/securebits.h; the bit after each locks it.
	noRoot         = 1 << 0
	keepCaps       = 1 << 4
	noAmbientRaise = 1 << 6
)

// dropPrivileges makes the process the user that it shall be, with no capability but those
// that it keeps.
func dropPrivileges(o Options, r *Report) error {
	if _, err := allThreads(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, fixed); errors.Is(err, unix.EPERM) {
		r.lacks("secure bits", errors.New("CAP_SETPCAP is missing"))
	} else if err != nil {
		return fmt.Errorf("set secure bits: %w", err)
	}
	if o.User != nil {
		if err := become(*o.User); err != nil {
			return err
		}
		r.holds("user " + strconv.Itoa(o.User.UID))
	}
	if err := setCapabilities(o); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

// become is for all threads, as package syscall does it.
func become(u User) error {
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("leave all groups: %w", err)
	}
	if err := syscall.Setresgid(u.GID, u.GID, u.GID); err != nil {
		return fmt.Errorf("become group %d: %w", u.GID, err)
	}
	if err := syscall.Setresuid(u.UID, u.UID, u.UID); err != nil {
		return fmt.Errorf("become user %d: %w", u.UID, err)
	}
	return nil
}

// setCapabilities keeps those of o that the process has. The ambient ones go with the
// inheritable ones.
func setCapabilities(o Options) error {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(header, &data[0]); err != nil {
		return err
	}
	keep := mask(o.Capabilities)
	if o.User != nil {
		keep = 0
	}
	for i := range data {
		data[i].Permitted &= uint32(keep >> (32 * i))
		data[i].Effective, data[i].Inheritable = data[i].Permitted, 0
	}
	_, err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(&data[0])))
	runtime.KeepAlive(header)
	runtime.KeepAlive(&data)
	return err
}

func mask(capabilities []int) (m uint64) {
	for _, c := range capabilities {
		m |= 1 << c
	}
	return m
}

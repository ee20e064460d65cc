package cachefiles

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"path"
	"strings"
)

const (
	// volumePrefix is what EROFS puts before the domain or the fsid
	// (fs/erofs/fscache.c, erofs_fscache_register_volume, 6.1).
	volumePrefix = "erofs,"
	// maxID leaves room for the prefixes in one name of a directory: a longer
	// volume is ENOBUFS or ENOMEM in the kernel.
	maxID = 248
	// maxCookie is the longest cookie that the kernel survives: a longer one is a
	// BUG in a kworker, and its mount never ends (fs/cachefiles/key.c,
	// cachefiles_cook_key, 6.1).
	maxCookie = 252
)

// A Key names an object as the kernel does.
type Key struct {
	Volume string // "erofs,<domain_id>" or "erofs,<fsid>", without the NUL
	Cookie string // blob id, device tag or fsid
}

// VolumeKey is the volume of a mount with these options; domain may be empty.
func VolumeKey(domain, fsid string) string {
	if domain != "" {
		return volumePrefix + domain
	}
	return volumePrefix + fsid
}

// ValidateID says what is wrong with id as an fsid or a domain_id: 1 to 248
// letters, digits, '.', '_' and '-', but not "." or "..". Check before the
// mount: the kernel takes a slash for a part of a path.
func ValidateID(id string) error {
	if id == "." || id == ".." {
		return fmt.Errorf("%q cannot be an fsid or a domain: it is a directory's name", id)
	}
	if err := validName(id, maxID); err != nil {
		return fmt.Errorf("%.300q cannot be an fsid or a domain: %w", id, err)
	}
	return nil
}

// Validate says what is wrong with k: a volume is "erofs," and a valid id, a
// cookie 1 to 252 letters, digits, '.', '_' and '-'.
func (k Key) Validate() error {
	id, ok := strings.CutPrefix(k.Volume, volumePrefix)
	if !ok {
		return fmt.Errorf("%.300q cannot be a volume: it must start with %q", k.Volume, volumePrefix)
	}
	if err := ValidateID(id); err != nil {
		return err
	}
	if err := validName(k.Cookie, maxCookie); err != nil {
		return fmt.Errorf("%.300q cannot be a cookie: %w", k.Cookie, err)
	}
	return nil
}

func validName(s string, most int) error {
	if s == "" {
		return errors.New("it is empty")
	}
	if len(s) > most {
		return fmt.Errorf("it has %d bytes, at most %d are allowed", len(s), most)
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return fmt.Errorf("byte %d is %q; only letters, digits, '.', '_' and '-' are allowed", i, c)
		}
	}
	return nil
}

// VolumePath is the directory of a volume, relative to the cache root.
func VolumePath(volume string) string { return "cache/I" + volume }

// Path is where the kernel keeps the object of a valid key, relative to the
// cache root. A new object gets there when it is closed, not before.
func (k Key) Path() string {
	dir, name := k.place()
	return path.Join(dir, name)
}

func (k Key) place() (dir, name string) {
	return fmt.Sprintf("%s/@%02x", VolumePath(k.Volume), k.hash()&0xff), "D" + k.Cookie
}

// hash is the cookie's hash (fs/fscache/cookie.c, fscache_set_key, and volume.c,
// fscache_alloc_volume, 6.1).
func (k Key) hash() uint32 {
	volume := append([]byte{byte(len(k.Volume))}, k.Volume...)
	return fscacheHash(fscacheHash(0, append(volume, 0)), []byte(k.Cookie))
}

// fscacheHash is fs/fscache/main.c, fscache_hash, 6.1.
func fscacheHash(salt uint32, p []byte) uint32 {
	x, y := uint32(0), salt
	for len(p) > 0 {
		var word [4]byte
		p = p[copy(word[:], p):]
		x ^= binary.LittleEndian.Uint32(word[:])
		y ^= x
		x = bits.RotateLeft32(x, 7) + y
		y = bits.RotateLeft32(y, 20) * 9
	}
	const golden = 0x61C88647
	return (y ^ x*golden) * golden
}

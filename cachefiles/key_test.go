package cachefiles_test

import (
	"strings"
	"testing"

	. "github.com/erofsd/erofsd/cachefiles"
)

// Directories that a 6.1 kernel made.
func TestKeyPath(t *testing.T) {
	for _, c := range []struct{ volume, cookie, fan string }{
		{"erofs,img1", "img1", "@83"},
		{"erofs,dom", "meta1", "@79"},
		{"erofs,dom", "meta2", "@06"},
		{"erofs,dom", "blobtag-0123456789abcdef", "@66"},
		{"erofs,meta1", "meta1", "@b2"},
		{"erofs,meta1", "blobtag-0123456789abcdef", "@c6"},
		{"erofs,meta2", "meta2", "@20"},
		{"erofs,meta2", "devopt", "@3a"},
		{"erofs,short", "short", "@e1"},
		{"erofs,bad", "bad", "@41"},
		{"erofs,sp ace", "sp ace", "@66"},
	} {
		want := "cache/I" + c.volume + "/" + c.fan + "/D" + c.cookie
		if got := (Key{c.volume, c.cookie}).Path(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	if got := VolumePath("erofs,img1"); got != "cache/Ierofs,img1" {
		t.Errorf("VolumePath: %s", got)
	}
}

func TestVolumeKey(t *testing.T) {
	if got := VolumeKey("", "img1"); got != "erofs,img1" {
		t.Error(got)
	}
	if got := VolumeKey("dom", "img1"); got != "erofs,dom" {
		t.Error(got)
	}
}

// Invariant 13: names that would hang a mount never reach the kernel.
func TestValidate(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	for id, ok := range map[string]bool{
		"a": true, "A-Z_0.9": true, "...": true, long(248): true,
		"": false, ".": false, "..": false, long(249): false, "a/b": false, "a,b": false, "a b": false, "a\x00": false, "ä": false, "\xff": false,
	} {
		if err := ValidateID(id); (err == nil) != ok {
			t.Errorf("ValidateID(%.20q): %v", id, err)
		}
		if err := (Key{"erofs," + id, "blob"}).Validate(); (err == nil) != ok {
			t.Errorf("volume of %.20q: %v", id, err)
		}
	}
	for cookie, ok := range map[string]bool{
		"a": true, ".": true, long(252): true,
		"": false, long(253): false, "a/b": false, "a\n": false,
	} {
		if err := (Key{"erofs,img", cookie}).Validate(); (err == nil) != ok {
			t.Errorf("cookie %.20q: %v", cookie, err)
		}
	}
	for _, volume := range []string{"", "erofs", "erofs,", "cifs,img", "img"} {
		if err := (Key{volume, "blob"}).Validate(); err == nil {
			t.Errorf("volume %q is valid", volume)
		}
	}
}

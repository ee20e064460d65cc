package config

import (
	"encoding"
	"encoding/base64"
	"math"
	"net/url"
	"reflect"
	"slices"
	"strings"
)

// A decoder puts nodes into structs by the tags of their fields:
//
//	key:"name"           the key, in every form
//	key:"name,required"  it must be there
//	nydus:"name"         the key in nydus's forms, where it differs
//	key:"-"              not from the document; an embedded struct's keys are the outer one's
//
// It goes on after what it finds wrong. A *node field takes what there is as it is.
type decoder struct {
	findings
	// own is erofsd's form: an unknown key is wrong, durations and sizes are text, and a
	// secret is the file of the key with _file behind. In nydus's forms unknown keys are
	// warnings, durations seconds, sizes numbers, and secrets stand in the document.
	own bool
	// secret reads a file of a secret; the error tells no content. For own.
	secret func(name string) (Secret, error)
	// entry is a blob entry's form, which knows no dummycache.
	entry bool
}

// A defaulter is a struct whose zero value is not what it is when nothing is said.
type defaulter interface{ setDefaults() }

// A legacy struct knows keys that are accepted and do nothing.
type legacy interface{ legacyKeys() []string }

// value decodes n into v, which is settable.
func (d *decoder) value(n *node, p path, v reflect.Value) {
	if n.kind == kindNull {
		return
	}
	switch into := v.Addr().Interface().(type) {
	case **node:
		*into = n
		return
	case *Duration:
		d.duration(n, p, into)
		return
	case *Size:
		d.size(n, p, into)
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			v.Set(newValue(v.Type().Elem()))
		}
		d.value(n, p, v.Elem())
	case reflect.Struct:
		d.object(n, p, v)
	case reflect.Slice:
		d.sequence(n, p, v)
	case reflect.Map:
		d.dictionary(n, p, v)
	case reflect.String:
		if d.want(n, p, kindText, "a string") {
			v.SetString(n.text)
		}
	case reflect.Bool:
		if d.want(n, p, kindBool, "a boolean") {
			v.SetBool(n.bool)
		}
	case reflect.Int:
		if d.want(n, p, kindInteger, "an integer") && d.fits(n, p, math.MaxInt32) {
			v.SetInt(n.number)
		}
	}
}

func newValue(t reflect.Type) reflect.Value {
	v := reflect.New(t)
	if def, ok := v.Interface().(defaulter); ok {
		def.setDefaults()
	}
	return v
}

// want finds a value of another kind wrong. It does not repeat the value.
func (d *decoder) want(n *node, p path, k kind, what string) bool {
	if n.kind != k {
		d.add(p, "invalid type: %s, expected %s", n.kind, what)
	}
	return n.kind == k
}

func (d *decoder) fits(n *node, p path, most int64) bool {
	ok := n.number >= 0 && n.number <= most
	if !ok {
		d.add(p, "invalid value: integer, expected 0 to %d", most)
	}
	return ok
}

func (d *decoder) duration(n *node, p path, into *Duration) {
	const second = Duration(1e9)
	if d.own {
		d.text(n, p, into, "a duration as \"5s\"")
	} else if d.want(n, p, kindInteger, "an integer") && d.fits(n, p, int64(maxDuration/second)) {
		*into = Duration(n.number) * second
	}
}

func (d *decoder) size(n *node, p path, into *Size) {
	if d.own && n.kind != kindInteger {
		d.text(n, p, into, "a size as \"10GiB\"")
	} else if d.want(n, p, kindInteger, "an integer") && d.fits(n, p, math.MaxInt64) {
		*into = Size(n.number)
	}
}

func (d *decoder) text(n *node, p path, into encoding.TextUnmarshaler, what string) {
	if !d.want(n, p, kindText, what) {
		return
	}
	if err := into.UnmarshalText([]byte(n.text)); err != nil {
		d.add(p, "%s", err)
	}
}

func (d *decoder) sequence(n *node, p path, v reflect.Value) {
	if !d.want(n, p, kindList, "a sequence") {
		return
	}
	for i, e := range n.list {
		element := newValue(v.Type().Elem()).Elem()
		d.value(e, p.index(i), element)
		v.Set(reflect.Append(v, element))
	}
}

// dictionary decodes headers: names and what is sent with them.
func (d *decoder) dictionary(n *node, p path, v reflect.Value) {
	if !d.want(n, p, kindObject, "a map") {
		return
	}
	for _, name := range n.names {
		element := reflect.New(v.Type().Elem()).Elem()
		d.value(n.fields[name], p.at(name), element)
		if d.own && credentialHeader(name) {
			d.add(p.at(name), "a secret is not written here: say it with auth_file or token_file")
			continue
		}
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		}
		v.SetMapIndex(reflect.ValueOf(name), element)
	}
}

func credentialHeader(name string) bool {
	return slices.Contains([]string{"authorization", "proxy-authorization", "cookie"}, strings.ToLower(name))
}

// object decodes the members of n into the fields of v, and finds what is left.
func (d *decoder) object(n *node, p path, v reflect.Value) {
	if !d.want(n, p, kindObject, "a map") {
		return
	}
	known := map[string]bool{}
	d.members(n, p, v, known)
	for _, name := range n.names {
		switch {
		case known[name]:
		case d.own:
			d.add(p.at(name), "unknown key")
		default:
			d.warn(p.at(name), "unknown key")
		}
	}
	if px, ok := v.Addr().Interface().(*Proxy); ok && !d.own {
		px.splitLogin()
	}
}

func (d *decoder) members(n *node, p path, v reflect.Value, known map[string]bool) {
	for i := range v.NumField() {
		field := v.Type().Field(i)
		if field.Anonymous {
			d.members(n, p, v.Field(i), known)
			continue
		}
		key, must := d.key(field)
		if key == "-" {
			continue
		}
		if into, ok := v.Field(i).Addr().Interface().(*Secret); ok && d.own {
			d.secretFile(n, p, field, into, known)
			continue
		}
		known[key] = true
		if member := n.field(key); member != nil {
			d.value(member, p.at(key), v.Field(i))
		} else if must {
			d.missing(p.at(key))
		}
	}
	if l, ok := v.Addr().Interface().(legacy); ok && !d.own {
		for _, key := range l.legacyKeys() {
			known[key] = true
		}
	}
}

// key is what the field is called in this form, and whether it must be there.
func (d *decoder) key(f reflect.StructField) (key string, must bool) {
	key, option, _ := strings.Cut(f.Tag.Get("key"), ",")
	if other := f.Tag.Get("nydus"); other != "" && !d.own {
		key = other
	}
	return key, option == "required"
}

// secretFile decodes a secret of our own form: the name of a file that holds it.
func (d *decoder) secretFile(n *node, p path, field reflect.StructField, into *Secret, known map[string]bool) {
	key, _ := d.key(field)
	inline := []string{key, field.Tag.Get("nydus")}
	for _, name := range inline {
		if name != "" && n.field(name) != nil {
			known[name] = true
			d.add(p.at(name), "a secret is not written here: put it into a file that others cannot read and name that with %s_file", key)
		}
	}
	file := key + "_file"
	known[file] = true
	member := n.field(file)
	if member == nil || !d.want(member, p.at(file), kindText, "a string") || member.text == "" {
		return
	}
	s, err := d.secret(member.text)
	if err != nil {
		d.add(p.at(file), "%s", err)
		return
	}
	if key == "auth" && strings.Contains(s.Reveal(), ":") {
		s = Secret(base64.StdEncoding.EncodeToString([]byte(s))) // written as user:password
	}
	*into = s
}

// splitLogin takes the login out of the URL, so that no URL of a configuration is a secret.
func (p *Proxy) splitLogin() {
	u, err := url.Parse(p.URL)
	if err != nil || u.User == nil {
		return
	}
	password, _ := u.User.Password()
	p.Login = Secret(u.User.Username() + ":" + password)
	u.User = nil
	p.URL = u.String()
}
